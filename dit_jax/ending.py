"""How every program ends: exit codes, one line for what a person can mend, and what signals do.

=====  =======================================  =====  ==============================================
0      done                                     7      network or model fetch
1      internal error, with its traceback       8      workdir full or not writable
2      usage or config                          9      another process lost, or stalled
3      data                                     75     told to stop, or out of time: start me again
4      diverged (loss or gradient not finite)   130    interrupted (Ctrl-C)
5      checkpoint unusable                      128+n  signal n came while an earlier one was obeyed
6      out of memory
=====  =======================================  =====  ==============================================
"""

import _thread
import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from dit_jax import processes
from dit_jax.errors import SIGNALS, PreemptedError, Told, UserError, WorkdirError, is_ignored

INTERNAL = 1
OUT_OF_MEMORY = 6
INTERRUPTED = 130
INSIST_EVERY = 0.5  # seconds after which what a signal raised is raised again, if it is lost
# What a full disk is called by the system and by tensorstore, whose messages begin with RESOURCE_EXHAUSTED too.
DISK_FULL = ("No space left", "os_error_code='28'", "Disk quota")
DEVICE_FULL = ("RESOURCE_EXHAUSTED", "CUDA_ERROR_OUT_OF_MEMORY")  # in errors of XLA


class _Ending:
    """How signals end a program: the first one lets it close what is open, one more ends it where it is.

    The first raises an exception. Callbacks of libraries lose exceptions now and then, so that it is raised again until
    it is on its way; and what is being imported makes an ImportError of it, so that `told` is kept.

    Python's handlers wait for its next instruction, and so for a compiler or a device. Therefore a thread counts the
    signals that the process gets, and ends it at the second one.

    Attributes:
      told: what was raised; None before the first signal.
      over: whether the program is through with what it does, and only says how it ended.
    """

    def __init__(self) -> None:
        self.told: BaseException | None = None
        self.over = self._insists = False
        self._own = 0  # signals that `_insist` sent, and that were not counted yet

    @contextlib.contextmanager
    def in_charge(self) -> Iterator[None]:
        """Have signals come here."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        before = {number: signal.signal(number, self) for number in SIGNALS if not is_ignored(number)}
        wakes = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._count, args=(reader,), daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakes)
            for number, handler in before.items():
                signal.signal(number, handler)
            writer.close()

    def _count(self, reader: socket.socket) -> None:
        """End the process at the second signal; return when nobody is in charge any more."""
        with reader:
            came = 0
            while numbers := reader.recv(64):
                for number in filter(SIGNALS.__contains__, numbers):
                    if self._own:
                        self._own -= 1
                        continue
                    came += 1
                    if came > 1:
                        os._exit(128 + number)

    def __call__(self, number: int, _: Any) -> None:
        """The handler."""
        if isinstance(sys.exception(), PreemptedError | KeyboardInterrupt) and self.told is None:
            os._exit(128 + number)  # `dit_jax.training.stop` obeyed the first
        if self.told is None:
            self.told = KeyboardInterrupt() if number == signal.SIGINT else Told(signal.Signals(number).name)
            if self.over:
                return  # it ends anyway
            _thread.start_new_thread(self._insist, (number,))  # takes no lock that this thread may hold
            raise self.told
        if not self._insists:
            os._exit(128 + number)
        self._insists = False
        if not self.over and not _is_handled(self.told):
            raise self.told

    def _insist(self, number: int) -> None:
        """Have the handler called again and again; once a run's own handler is there (`Stop`), that one, once."""
        ours = True
        while ours:
            time.sleep(INSIST_EVERY)
            ours = self._insists = signal.getsignal(number) == self
            if self.over:
                return
            self._own += 1
            if hasattr(signal, "pthread_kill"):  # Windows has none, and waits until what blocks is over
                signal.pthread_kill(threading.main_thread().ident or 0, number)
            else:
                _thread.interrupt_main(signal.Signals(number))


def _is_handled(error: BaseException) -> bool:
    """Whether this thread is in an ``except``, ``finally`` or ``__exit__`` because of an exception."""
    handled = sys.exception()
    while handled is not None and handled is not error:
        handled = handled.__context__
    return handled is error


def run_program(main: Callable[[], None], show_traceback: bool, less_memory: str | Callable[[], str]) -> None:
    """Call ``main`` and exit as the table says; a `UserError` becomes one line, a bug keeps its traceback.

    ``less_memory`` is what the user of this program can do when the device's memory is not enough, or says it.
    """
    ending = _Ending()
    with ending.in_charge():
        _run(main, ending, show_traceback, less_memory)


def _run(main: Callable[[], None], ending: _Ending, show_traceback: bool, less_memory: str | Callable[[], str]) -> None:
    try:
        try:
            main()
        finally:
            ending.over = True
        processes.finish()
    except UserError as error:
        _end(f"{error.kind}: {error}", error.exit_code, show_traceback, error.of_all)
    except KeyboardInterrupt as error:
        _end_told(error, show_traceback)
    except Told as told:
        _end_told(told, show_traceback)
    except Exception as error:
        if ending.told is not None:
            _end_told(ending.told, show_traceback)
        processes.blame(error)
        said = str(error)
        if any(sign in said for sign in DISK_FULL):
            full = f"{WorkdirError.kind}: the disk is full; make room and start again ({said.splitlines()[0]})"
            _end(full, WorkdirError.exit_code, show_traceback, False)
        if not (isinstance(error, RuntimeError) and any(sign in said for sign in DEVICE_FULL)):
            if processes.count() > 1:
                traceback.print_exc()
                processes.leave(repr(error), INTERNAL)
            raise
        advice = less_memory if isinstance(less_memory, str) else less_memory()
        _end(f"out of memory: the device cannot hold this; {advice}", OUT_OF_MEMORY, show_traceback, False)


def _end(line: str, code: int, show_traceback: bool, of_all: bool, leave: Callable[[int], Any] = sys.exit) -> None:
    """End with a line and a code.

    ``of_all``: every process of the run ends like this; else the others are told that this one does.
    """
    if show_traceback:
        traceback.print_exc()
    # what a stranger's file is called, or says, must not write to a terminal as it likes
    shown = "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in line)
    print(shown, file=sys.stderr, flush=True)
    if of_all:
        processes.finish()
    processes.leave(line, code)
    leave(code)


def _end_told(told: BaseException, show_traceback: bool) -> None:
    """The program ends because of a signal."""
    if isinstance(told, KeyboardInterrupt):
        agreed = bool(str(told))  # by `dit_jax.training.stop`, which says where the run stands
        line = ": ".join(filter(None, ["interrupted", str(told)]))
        _end(line, INTERRUPTED, show_traceback, agreed, _leave_at_once)
    line = f"{PreemptedError.kind}: {told}; start the same command again"
    _end(line, PreemptedError.exit_code, show_traceback, False, _leave_at_once)


def _leave_at_once(code: int) -> NoReturn:
    """All that was open is closed; threads of XLA, which may compile still, must not see the process taken apart."""
    sys.stdout.flush()
    os._exit(code)


@contextlib.contextmanager
def writable(folder: Path) -> Iterator[None]:
    """What cannot be written ends the program with the folder's name."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise WorkdirError(f"cannot write to {folder}: {reason}; give another folder") from error
