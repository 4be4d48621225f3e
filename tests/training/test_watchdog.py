"""A step that does not end is ended, with the stacks of all threads; what is slow but moves is left alone."""

import subprocess
import sys
import time

import pytest

from dit_jax.training.watchdog import FACTOR, Watchdog

STALLS = """
import sys, time
from pathlib import Path
from dit_jax.training.watchdog import Watchdog

def a_collective_that_waits():
    time.sleep(60)

with Watchdog(0.3, Path(sys.argv[1]) / "logs", lambda reason: Path(sys.argv[1], "said").write_text(reason)) as watchdog:
    for step in (1, 2, 3):
        watchdog.begin(step)
    with watchdog.resting():
        time.sleep(1)
    a_collective_that_waits()
"""


def test_a_step_that_does_not_end_ends_the_process_with_its_stacks(tmp_path):
    done = subprocess.run([sys.executable, "-c", STALLS, str(tmp_path)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 9
    (stacks,) = (tmp_path / "logs").iterdir()
    assert stacks.name.startswith("stalled-step3-process0") and "a_collective_that_waits" in stacks.read_text()
    assert done.stderr.startswith("lost: step 3 has not ended after ") and str(stacks) in done.stderr
    assert (tmp_path / "said").read_text() in done.stderr


@pytest.fixture
def lenient(tmp_path, monkeypatch):
    """A watchdog that notes what it would have ended."""
    ended = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, seconds, limit: ended.append((self._step, seconds, limit)))
    return ended, tmp_path


def test_what_is_usual_is_left_alone_and_so_is_what_is_no_step(lenient):
    ended, folder = lenient
    with Watchdog(0.02, folder, print) as watchdog:
        time.sleep(0.1)  # nothing has begun
        watchdog.begin(1)
        with watchdog.resting(), watchdog.resting():
            time.sleep(0.1)
        assert not ended
        watchdog._seconds.extend([0.02] * 9)  # steps of 20 ms: 0.4 s are not much
        assert watchdog.limit() == pytest.approx(FACTOR * 0.02)
        time.sleep(0.1)
        assert not ended
        time.sleep(0.5)
    assert ended and ended[0][0] == 1 and ended[0][1] > ended[0][2]


def test_no_patience_watches_nothing(lenient):
    ended, folder = lenient
    with Watchdog(0.0, folder, print) as watchdog:
        watchdog.begin(1)
        time.sleep(0.1)
    assert not ended
