"""Work done ahead comes in order, stops when nobody wants it, and never keeps a run or a program waiting for ever."""

import ctypes
import functools
import multiprocessing
import operator
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest

from dit_jax.data.ahead import ahead, gathered, in_processes, in_threads
from dit_jax.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[2]
LONG = 60.0  # seconds: more than any of these tests may take


def wait_until(holds, seconds=8.0):
    """Whether it holds in time."""
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


@pytest.fixture(autouse=True)
def nothing_is_left():
    """Every test ends with the threads and processes that it began with."""
    threads = set(threading.enumerate())
    yield
    assert wait_until(lambda: set(threading.enumerate()) <= threads)
    assert not multiprocessing.active_children()


def uneven(item):
    """Ten times the item, after a time that turns the order around."""
    time.sleep(0.002 * (-item % 5))
    return 10 * item


def large(item):
    """The item and a third of a megabyte."""
    return item, bytes(300_000)


TEN_TIMES = [10 * item for item in range(23)]


# --- threads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_threads_keep_the_order(threads):
    assert list(in_threads(uneven, range(23), threads, 6, LONG, "it")) == TEN_TIMES
    assert list(gathered(uneven, 4, 9, threads)) == TEN_TIMES[4:9]
    assert list(gathered(uneven, 4, 4, threads)) == []


def test_threads_are_ahead_but_not_without_bound():
    seen = []
    with closing(in_threads(seen.append, range(1000), 3, 8, LONG, "it")) as stream:
        next(stream)
        assert wait_until(lambda: len(seen) == 9)
        assert len(list(islice(stream, 4))) == 4
        assert wait_until(lambda: len(seen) == 13)
        time.sleep(0.05)
        assert len(seen) == 13


def test_what_a_thread_raises_comes_in_its_place():
    stream = in_threads(functools.partial(operator.truediv, 6), [1, 2, 0, 3], 2, 4, LONG, "it")
    assert [next(stream), next(stream)] == [6, 3]
    with pytest.raises(ZeroDivisionError):
        next(stream)


def test_a_timeout_of_its_own_is_not_taken_for_ours():
    def fail(item):
        raise TimeoutError("of the network")

    with pytest.raises(TimeoutError, match="of the network"):
        next(in_threads(fail, [1], 1, 1, LONG, "it"))


def test_threads_that_never_return_are_left_behind():
    released = threading.Event()

    def block(item):
        if item == 2:
            released.wait()
        return item

    stream = in_threads(block, range(100), 2, 4, 0.2, "reading cats")
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(DataError, match=r"^reading cats: nothing came for 0\.2 seconds; .*data\.patience"):
        next(stream)
    released.set()


# --- processes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "threads"), [(1, 0), (3, 2)])
def test_processes_keep_the_order(workers, threads):
    assert list(in_processes(uneven, range(23), workers, threads, 4, LONG, "it")) == TEN_TIMES


def test_there_may_be_fewer_items_than_processes():
    assert list(in_processes(uneven, range(1), 4, 1, 4, LONG, "it")) == [0]
    assert list(in_processes(uneven, range(0), 4, 1, 4, LONG, "it")) == []


def test_large_results_do_not_pile_up():
    """A worker whose results nobody takes waits, and ends when the stream is closed."""
    with closing(in_processes(bytes, [3 * 10**6] * 1000, 2, 1, 3, LONG, "it")) as stream:
        assert [len(result) for result in islice(stream, 5)] == [3 * 10**6] * 5


class Stubborn(Exception):
    """Cannot be pickled."""

    def __init__(self, one, other):
        super().__init__("stubborn")


def misbehave(item):
    """What goes wrong with a reader, by name."""
    if item == "data error":
        raise DataError("the disk is broken")
    if item == "stubborn":
        raise Stubborn(1, 2)
    if item == "sys.exit":
        sys.exit(3)
    if item == "exit":
        os._exit(0)
    if item == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "crash":
        ctypes.string_at(0)
    if item == "blocked":
        time.sleep(1000)
    return item


@pytest.mark.filterwarnings("ignore:.*it is started again")
@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("data error", DataError, "^the disk is broken"),
        ("stubborn", DataError, "^cats: a worker process failed: RuntimeError: Stubborn"),
        ("sys.exit", DataError, r"told to exit: SystemExit\(3\) \(--traceback"),
        ("exit", DataError, "^cats: a worker process ended with exit code 0"),
        ("killed", DataError, "^cats: a worker process was killed by SIGKILL, .*fewer data.workers"),
        ("crash", DataError, "^cats: a worker process was killed by SIG(SEGV|BUS)"),
    ],
)
def test_what_happens_to_a_process_ends_the_run_at_once(how, error, message, threads):
    begin = time.monotonic()
    stream = in_processes(misbehave, ["a", "b", "c", how, "d", "e"], 2, threads, 1, LONG, "cats")
    if how in ("data error", "stubborn", "sys.exit"):  # a process that dies may take results with it
        assert list(islice(stream, 3)) == ["a", "b", "c"]
    with pytest.raises(error, match=message) as raised:
        list(stream)
    assert "\n" not in str(raised.value)
    assert time.monotonic() - begin < LONG / 2


def test_a_process_that_is_killed_is_started_again_and_nobody_can_tell():
    """Both, and one of them again: who gets on is no hopeless case. Results are so large that the pipes hold few."""
    expected = [(item, bytes(300_000)) for item in range(60)]
    with closing(in_processes(large, range(60), 2, 2, 4, LONG, "cats")) as stream:
        found = list(islice(stream, 5))
        for count in (2, 1):
            for process in multiprocessing.active_children()[:count]:
                process.kill()
            with pytest.warns(UserWarning, match="cats: a worker .* SIGKILL.*; it is started again, at item") as told:
                found += islice(stream, 20)
            assert len(told) == count
        assert found + list(stream) == expected


def test_a_process_that_never_returns_is_killed():
    stream = in_processes(misbehave, ["a", "b", "blocked"], 2, 1, 4, 3.0, "cats")
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"^cats: nothing came for 3 seconds"):
        list(stream)
    assert time.monotonic() - begin < LONG / 2


def test_leaving_early_stops_blocked_processes():
    begin = time.monotonic()
    with closing(in_processes(misbehave, ["a", "blocked", "blocked"], 2, 1, 4, LONG, "cats")) as stream:
        assert next(stream) == "a"
    assert time.monotonic() - begin < LONG / 2


def test_a_signal_to_all_is_for_the_parent():
    """A scheduler signals every process of a run; what is to be done about it is not the workers' business."""
    with closing(in_processes(uneven, range(10_000), 2, 1, 4, LONG, "cats")) as stream:
        assert list(islice(stream, 2)) == [0, 10]  # both work
        for process in multiprocessing.active_children():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                os.kill(process.pid, number)
        assert list(islice(stream, 200)) == [10 * item for item in range(2, 202)]


# --- programs -----------------------------------------------------------------------------------------------

BLOCKED_WORKERS = """
import contextlib, multiprocessing, time
from dit_jax.data import ahead
ahead.CLOSING = 0.5
stream = ahead.in_processes(time.sleep, [0, 1000, 1000, 1000], 2, {threads}, 2, 60, "cats")
if {in_a_thread}:
    stream = ahead.ahead(stream, 1, 60, "cats")
with contextlib.closing(stream):
    next(stream)
    print(*[process.pid for process in multiprocessing.active_children()], flush=True)
    next(stream)
"""


def start(program):
    return subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def is_gone(pid):
    """Whether a process ended; nobody may have asked a child of init for its exit code yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
@pytest.mark.parametrize(("threads", "in_a_thread"), [(0, False), (1, False), (1, True)])
@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT", "SIGTERM"])
def test_no_process_outlives_the_program(how, threads, in_a_thread):
    """SIGKILL and SIGTERM reach the program alone, as those of a scheduler may; Ctrl-C reaches its workers too."""
    program = start(BLOCKED_WORKERS.format(threads=threads, in_a_thread=in_a_thread))
    with program:
        workers = [int(pid) for pid in program.stdout.readline().split()]
        assert len(workers) == 2 and not any(map(is_gone, workers))
        send = os.killpg if how == "SIGINT" else os.kill
        send(program.pid, signal.Signals[how])
        errors = program.communicate(timeout=15)[1]
        assert wait_until(lambda: all(map(is_gone, workers)))
    if how == "SIGINT":
        assert errors.count("Traceback") == 1 and errors.rstrip().endswith("KeyboardInterrupt")


@pytest.mark.parametrize(
    "program",
    [
        "next(in_threads(time.sleep, [1000], 1, 1, 0.2, 'cats'))",
        "next(ahead(in_threads(time.sleep, [1000], 1, 1, 0, ''), 2, 0.2, 'cats'))",
        "next(ahead(in_processes(time.sleep, [1000], 1, 1, 1, 0, ''), 2, 0.2, 'cats'))",
    ],
)
def test_a_program_ends_although_a_read_never_does(program):
    begin = time.monotonic()
    with start(f"import time; from dit_jax.data.ahead import *; {program}") as process:
        errors = process.communicate(timeout=20)[1]
    assert process.returncode == 1 and "cats: nothing came for 0.2 seconds" in errors
    assert time.monotonic() - begin < 15


# --- an iterator in a thread --------------------------------------------------------------------------------


def test_ahead_gives_what_the_iterator_gives():
    with closing(ahead(iter(range(50)), 3, LONG, "it")) as items:
        assert list(items) == list(range(50))
        with pytest.raises(StopIteration):
            next(items)


def test_ahead_runs_in_another_thread_and_is_ready():
    seen = []

    def numbers():
        for i in range(100):
            seen.append((i, threading.current_thread()))
            yield i

    with closing(ahead(numbers(), 3, LONG, "it")) as items:
        assert wait_until(lambda: len(seen) == 3)  # before anybody asks
        time.sleep(0.05)
        assert len(seen) == 3
        assert next(items) == 0 and wait_until(lambda: len(seen) == 4)
        assert {thread for _, thread in seen} != {threading.current_thread()}


def test_what_the_iterator_raises_comes_after_what_it_gave():
    def failing():
        yield from "ab"
        raise DataError("no more")

    items = ahead(failing(), 8, LONG, "it")
    assert [next(items), next(items)] == ["a", "b"]
    with pytest.raises(DataError, match="no more"):
        next(items)
    with pytest.raises(StopIteration):
        next(items)


@pytest.mark.parametrize("wrap", [iter, functools.partial(map, str)], ids=["generator", "map"])
def test_closing_ahead_ends_the_iterator(wrap):
    ended = threading.Event()

    def numbers():
        try:
            yield from range(10**9)
        finally:
            ended.set()

    items = ahead(wrap(numbers()), 2, LONG, "it")
    next(items)
    items.close()
    assert ended.is_set()
    with pytest.raises(StopIteration):
        next(items)


def test_ahead_waits_no_longer_than_it_is_told():
    released = threading.Event()

    def slow():
        yield 1
        released.wait()

    items = ahead(slow(), 2, 0.2, "reading cats")
    assert next(items) == 1
    with pytest.raises(DataError, match=r"^reading cats: nothing came for 0\.2 seconds"):
        next(items)
    begin = time.monotonic()
    items.close()
    assert time.monotonic() - begin < 1
    released.set()


def test_patience_is_for_one_item_not_for_all():
    with closing(ahead((time.sleep(0.1) or i for i in range(5)), 1, 0.35, "it")) as items:
        assert list(items) == list(range(5))
