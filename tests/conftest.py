"""How the tests run: on the CPU with two fake devices, strict about shapes, without a network.

The environment is set here, before JAX is imported, so that ``pytest`` alone does the same as
``launch/test.sh`` and the programs that tests start inherit it.
"""

import os
from pathlib import Path

import pytest

from tests import xla


def _compile_cache() -> str:
    """A folder of compiled functions that only this user can write: a second run of the suite is quicker."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dit_jax" / "tests"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    return str(folder)


os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _compile_cache())
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla.flags(devices=2)}".strip()
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the network is a bug
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real pictures kept beside the repository; tests that need them skip where they are absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no pictures at {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a finished run of 20 steps; tests read it and leave it as it is."""
    from tests.tiny_run import train_tiny

    return train_tiny(tmp_path_factory.mktemp("runs") / "tiny")
