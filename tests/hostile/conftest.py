"""How hostile bytes are tried: which examples, how many, and within what time and memory.

As part of the suite the examples are few and always the same. ``DIT_JAX_SOAK=1`` draws new ones on every run, and many;
what it finds becomes an ``@example`` or a test of its own.
"""

import contextlib
import os
import signal
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, configuration, settings

SECONDS = 10.0  # an example takes milliseconds
MEMORY = 2**31  # bytes beyond what the process has: the examples have kilobytes

configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / f"dit_jax_hypothesis_{os.getuid()}")
FIXTURES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "suite", derandomize=True, database=None, max_examples=40, deadline=None, suppress_health_check=FIXTURES
)
settings.register_profile(
    "soak", database=None, max_examples=2000, deadline=None, suppress_health_check=FIXTURES, print_blob=True
)
settings.load_profile("soak" if os.environ.get("DIT_JAX_SOAK") == "1" else "suite")


@pytest.fixture(autouse=True)
def little_memory():
    """Whoever believes a number in a file and makes room for it gets a MemoryError, which is nobody's error here."""
    resource = pytest.importorskip("resource")
    has = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (has + MEMORY, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def soon():
    """A context in which what does not end is an AssertionError."""

    @contextlib.contextmanager
    def limit():
        def ring(*_):
            raise AssertionError(f"it takes more than {SECONDS:g} seconds")

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    return limit
