"""How programs start: what libraries may say, and what XLA is told before it does."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from dit_jax import runtime


def test_writes_of_a_failed_save_that_nobody_waits_for_are_not_shown():
    program = """
import asyncio
from dit_jax.runtime import quiet_libraries

quiet_libraries()
loop = asyncio.new_event_loop()
loop.create_future().set_exception(OSError("No space left on device"))
loop.close()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


def test_xla_is_asked_for_the_same_bits_before_it_starts():
    """By a flag that this XLA knows: of one that it does not know it aborts."""
    program = """
import os
from dit_jax.runtime import DETERMINISTIC, set_up
set_up(True, False, deterministic=True)
assert os.environ["XLA_FLAGS"].split()[-1] == DETERMINISTIC
import jax
print(jax.jit(lambda x: x + 1)(1))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


def test_a_process_knows_when_it_began(monkeypatch):
    program = "import time; time.sleep(1); from dit_jax import runtime as r; print(r.IMPORTED - r.begun())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 1 <= float(done.stdout) < 60
    assert runtime.begun() == pytest.approx(runtime.begun(), abs=0.1) and runtime.begun() < time.monotonic()
    monkeypatch.setattr(Path, "read_text", lambda *_: "")  # as where nothing tells
    assert runtime.begun() == runtime.IMPORTED
