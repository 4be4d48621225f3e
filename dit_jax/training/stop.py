"""When a run ends before its last step: it was told to by a signal, or its time is up.

    signal       first                                            second, at any moment
    SIGTERM      the step is finished and saved, exit code 75     the process ends at once, 128 + 15
    SIGUSR1      the same                                         128 + 10
    SIGHUP       the same, unless nohup has it ignored            128 + 1
    SIGINT       the same, exit code 130                          130
    max_hours    the same as a first SIGTERM

Of several processes each may be told, and all stop after the same step: after every step each says what it was told,
and hears what any was (`Stop.agreed`, `dit_jax.processes.Agreement`).

A scheduler sends SIGTERM or SIGUSR1 before it takes a machine away, and starts the program again where that ends with
75. What is under way beside the steps, such as a grid of samples, is broken off (`Stop.unless_told`) and made good by
the process that goes on; several processes do it to its end, as they do it together.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from dit_jax.errors import SIGNALS, PreemptedError, is_ignored

Result = TypeVar("Result")
# As processes tell them each other, by number: the last prevails.
REASONS = ("", "max_hours", "SIGHUP", "SIGUSR1", "SIGTERM", "SIGINT")


class _BreakOff(BaseException):
    """Raised by a signal inside `Stop.unless_told`; no error, so that nothing on the way takes it for one."""


class Stop:
    """Listens while it is entered, and gives the handlers of before back. Signals reach the main thread only.

    Args:
      deadline: when the run stops by itself, on the clock of `time.monotonic`; None for never.
      agree: a number of this process -> the largest of all processes, which other devices may be slow to tell; None
        where there is no other process, and this one may leave what it does in `unless_told` by itself.

    Attributes:
      reason: why to stop, in a word; empty while this process knows of no reason.
    """

    def __init__(self, deadline: float | None, agree: Callable[[int], int] | None):
        self._deadline, self._agree = deadline, agree
        self._inside = self._signalled = False
        self._reason = ""
        self._before: dict[int, Any] = {}

    @property
    def reason(self) -> str:
        if not self._reason and self._deadline is not None and time.monotonic() >= self._deadline:
            self._reason = "max_hours"
        return self._reason

    def agreed(self) -> bool:
        """Whether the run stops after the step that was taken; asked once a step, by all processes alike."""
        if self._agree is None:
            return bool(self.reason)
        number = self._agree(REASONS.index(self.reason))
        self._reason = REASONS[number] or self._reason
        return number > 0

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._note) for n in SIGNALS if not is_ignored(n)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # None is one that Python did not set
                signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        if self._signalled:  # not: told by another process, which schedulers signal a little earlier
            os._exit(128 + number)
        self._signalled = True
        self._reason = signal.Signals(number).name
        # not print: what it would write to may be in the middle of a line
        os.write(1, f"{self._reason}: the step is finished and saved; once more ends at once, unsaved\n".encode())
        if self._inside:
            raise _BreakOff

    def unless_told(self, perform: Callable[[], Result]) -> Result | None:
        """Call a function, but not once a signal came; None if one had come, or broke it off.

        A deadline is looked at between steps only: it cannot break off either.
        """
        if self._agree is not None:
            return perform()
        try:
            self._inside = True
            if self._reason:
                raise _BreakOff
            result = perform()
            self._inside = False
            return result
        except _BreakOff:
            return None
        except Exception:
            if self._signalled:  # libraries make errors of their own of what breaks them off
                return None
            raise
        finally:
            self._inside = False

    def end(self, step: int) -> None:
        """Raise what ends the program, as the run stopped after ``step`` and has saved it.

        Raises:
          KeyboardInterrupt: it was interrupted.
          PreemptedError: every other reason.
        """
        said = f"{self.reason}: step {step} is saved; the same command goes on from there"
        if self.reason == signal.SIGINT.name:
            raise KeyboardInterrupt(said)
        raise PreemptedError(said)
