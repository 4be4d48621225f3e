"""How programs end: each kind of failure has its exit code and one line that says what to do."""

import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from dit_jax.ending import run_program, writable
from dit_jax.errors import WorkdirError

TENSORSTORE_FULL = (
    "RESOURCE_EXHAUSTED: Error writing \"params/ocdbt.process_0/d/1\" [os_error_code='28']"
    " [source locations='tensorstore/internal/os/file_util_posix.cc:520']"
)


def ends_with(error: Exception, capsys) -> tuple[int, str]:
    """Exit code and stderr of a program that fails with ``error``."""

    def main():
        raise error

    with pytest.raises(SystemExit) as exit:
        run_program(main, False, "draw less")
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return exit.value.code, said


@pytest.mark.parametrize(
    "error",
    [
        ValueError(TENSORSTORE_FULL + "\nwhile saving step 5"),
        OSError(28, "No space left on device", "metrics.jsonl"),
        OSError(122, "Disk quota exceeded", "metrics.jsonl"),
    ],
)
def test_a_full_disk_is_not_called_out_of_memory(error, capsys):
    code, said = ends_with(error, capsys)
    assert code == 8 and "the disk is full" in said and str(error).splitlines()[0] in said


@pytest.mark.parametrize(
    "said",
    [
        "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes",
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm",
        "INTERNAL: Failed to allocate 9 bytes: CUDA_ERROR_OUT_OF_MEMORY: out of memory",
    ],
)
def test_out_of_memory_ends_with_what_this_program_can_do(said, capsys):
    code, line = ends_with(jax.errors.JaxRuntimeError(said), capsys)
    assert (code, line) == (6, "out of memory: the device cannot hold this; draw less\n")


@pytest.mark.parametrize(
    "ask_for_too_much",
    [lambda: jnp.zeros(2**44), lambda: jax.jit(lambda a: jnp.outer(a, a).sort().sum())(jnp.zeros(2**24)).item()],
    ids=["an array", "what a compiled function needs"],
)
def test_what_xla_really_raises_is_out_of_memory(ask_for_too_much, capsys):
    with pytest.raises(SystemExit) as exit:
        run_program(ask_for_too_much, False, lambda: "think")
    assert exit.value.code == 6
    assert capsys.readouterr().err == "out of memory: the device cannot hold this; think\n"


def test_a_busy_bucket_is_not_out_of_memory():
    def main():
        raise ValueError("RESOURCE_EXHAUSTED: too many requests")

    with pytest.raises(ValueError, match="too many requests"):
        run_program(main, False, "")


def test_a_bug_keeps_its_traceback():
    def main():
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        run_program(main, False, "")


def test_what_cannot_be_written_names_the_folder(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(WorkdirError, match=f"cannot write to {file}: File exists"), writable(file):
        file.mkdir(exist_ok=True)


ASKED_TO_END = """
import signal, sys, threading, time
from dit_jax.ending import run_program

def main():
    threading.Thread(target=time.sleep, args=(60,)).start()  # as a compiler's: nobody waits for it
    try:
        signal.raise_signal(signal.{first})
    except Exception:
        print("taken for an error")
    finally:
        if {second}:
            signal.raise_signal({second})
        print("closed")

run_program(main, False, "")
"""


@pytest.mark.parametrize(
    ("first", "second", "code", "closes", "says"),
    [
        ("SIGINT", 0, 130, True, "interrupted"),
        ("SIGTERM", 0, 75, True, "preempted: SIGTERM; start the same command again"),
        ("SIGUSR1", 0, 75, True, "preempted: SIGUSR1; start the same command again"),
        ("SIGTERM", int(signal.SIGTERM), 143, False, ""),
        ("SIGTERM", int(signal.SIGINT), 130, False, ""),
    ],
)
def test_a_signal_ends_a_program_that_closes_what_is_open_and_a_second_one_at_once(first, second, code, closes, says):
    program = ASKED_TO_END.format(first=first, second=second)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (code, "closed\n" if closes else "")
    assert done.stderr.startswith(says) and done.stderr.count("\n") == bool(says)


LOSING = """
import signal, time
from dit_jax.ending import run_program
from dit_jax.training.stop import Stop

def lost():
    try:
        signal.raise_signal(signal.SIGTERM)
    except BaseException:
        {instead}

def main():
    lost()
    try:
        {then}
    finally:
        time.sleep(1.5)  # so long that it would be raised again twice
        print("closed")

run_program(main, False, "")
"""


@pytest.mark.parametrize(
    ("instead", "then", "says"),
    [
        ("pass", "time.sleep(30)", "preempted: SIGTERM; start the same command again"),
        ("raise ImportError('an extension did not load')", "pass", "preempted: SIGTERM; start the same command again"),
        (
            "pass",
            "with Stop(None, None) as stop: time.sleep(2); stop.agreed() and stop.end(7)",
            "preempted: SIGTERM: step 7 is saved",
        ),
    ],
)
def test_a_signal_whose_exception_a_library_loses_ends_the_program_all_the_same(instead, then, says):
    program = LOSING.format(instead=instead, then=then)
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 75 and done.stderr.startswith(says) and done.stderr.count("\n") == 1, done.stderr
    closed = "" if "raise" in instead else "closed\n"
    assert (
        done.stdout.removeprefix("SIGTERM: the step is finished and saved; once more ends at once, unsaved\n") == closed
    )
    assert time.monotonic() - begin < 20


BUSY = """
import hashlib
from dit_jax.ending import run_program

def main():
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"as a compiler", b"no handler runs meanwhile", 10**9)

run_program(main, False, "")
"""


def test_a_second_signal_ends_also_a_program_that_does_not_come_to_its_handlers():
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"busy\n"
        time.sleep(0.5)  # from saying so to being so
        process.send_signal(signal.SIGUSR1)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.5)  # and what insists counts for nothing
        process.send_signal(signal.SIGTERM)
        assert process.wait(2) == 128 + signal.SIGTERM
