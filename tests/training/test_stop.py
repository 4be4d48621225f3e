"""When a run is told to end: what its process does at a first signal and at a second one."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from dit_jax.errors import SIGNALS, PreemptedError
from dit_jax.training.stop import REASONS, Stop


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (signal.SIGTERM, PreemptedError),
        (signal.SIGUSR1, PreemptedError),
        (signal.SIGHUP, PreemptedError),
        (signal.SIGINT, KeyboardInterrupt),
    ],
)
def test_a_signal_is_a_reason_and_does_not_interrupt(number, error, capfd):
    before = [signal.getsignal(each) for each in SIGNALS]
    with Stop(None, agree=None) as stop:
        assert not stop.reason
        signal.raise_signal(number)
        assert stop.reason == signal.Signals(number).name
        assert (
            capfd.readouterr().out
            == f"{stop.reason}: the step is finished and saved; once more ends at once, unsaved\n"
        )
        with pytest.raises(error, match=f"{stop.reason}: step 7 is saved"):
            stop.end(7)
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_the_time_is_up_at_the_deadline_and_a_signal_then_ends_nothing_at_once():
    with Stop(time.monotonic() + 0.05, agree=None) as stop:
        assert not stop.reason
        time.sleep(0.06)
        assert stop.reason == "max_hours"
        signal.raise_signal(signal.SIGTERM)
        assert stop.reason == "SIGTERM"


def test_a_signal_breaks_off_what_may_be_broken_off():
    done = []

    def told():
        done.append("begun")
        signal.raise_signal(signal.SIGTERM)
        done.append("whole")
        return "done"

    with Stop(None, agree=None) as stop:
        assert stop.unless_told(lambda: "done") == "done"
        assert stop.unless_told(told) is None and done == ["begun"]
        assert stop.unless_told(lambda: done.append("again")) is None and done == ["begun"]
    with Stop(None, agree=lambda mine: mine) as stop:
        assert stop.unless_told(told) == "done" and stop.reason == "SIGTERM"


def test_what_one_process_is_told_all_are_and_its_own_signal_may_come_later():
    others = [0, 0, REASONS.index("SIGTERM")]
    with Stop(None, agree=lambda mine: max(mine, others.pop(0))) as stop:
        assert not stop.agreed() and not stop.agreed() and not stop.reason
        assert stop.agreed() and stop.reason == "SIGTERM"
        signal.raise_signal(signal.SIGTERM)  # the first that this process gets: it still saves
        with pytest.raises(PreemptedError, match="SIGTERM: step 7 is saved"):
            stop.end(7)


def test_a_second_signal_ends_the_process_at_once():
    program = """
import signal, time
from dit_jax.training.stop import Stop
with Stop(None, agree=None):
    signal.raise_signal(signal.SIGINT)
    print("saving", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline().startswith(b"SIGINT: the step is finished")
        assert process.stdout.readline() == b"saving\n"
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM and time.monotonic() - begin < 2


def test_who_is_to_outlive_the_terminal_does():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with Stop(None, None) as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.reason
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_the_main_thread_nothing_listens():
    found = []

    def listen():
        with Stop(None, agree=None) as stop:
            found.append((stop.reason, signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [("", before)]
