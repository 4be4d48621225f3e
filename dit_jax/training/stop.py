"""When a run ends before its last step: it was told to by a signal, or its time is up.

    signal       first                                            second, at any moment
    SIGTERM      the step is finished and saved, exit code 75     the process ends at once, 128 + 15
    SIGUSR1      the same                                         128 + 10
    SIGINT       the same, exit code 130                          130
    max_hours    the same as a first SIGTERM

A scheduler sends SIGTERM or SIGUSR1 before it takes a machine away, and starts the program again where that ends with
75. What is under way beside the steps, such as a grid of samples, is broken off (`Stop.unless_told`) and made good by
the process that goes on.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from dit_jax.errors import SIGNALS, PreemptedError

Result = TypeVar("Result")


class _BreakOff(BaseException):
    """Raised by a signal inside `Stop.unless_told`; no error, so that nothing on the way takes it for one."""


class Stop:
    """Listens while it is entered, and gives the handlers of before back. Signals reach the main thread only.

    Args:
      deadline: when the run stops by itself, on the clock of `time.monotonic`; None for never.
      may_break_off: whether this process may leave what it does in `unless_told` by itself.

    Attributes:
      reason: why to stop, in a word; empty while there is no reason.
    """

    def __init__(self, deadline: float | None, may_break_off: bool):
        self._deadline = deadline
        self._may_break_off, self._inside = may_break_off, False
        self._reason = ""
        self._before: dict[int, Any] = {}

    @property
    def reason(self) -> str:
        if not self._reason and self._deadline is not None and time.monotonic() >= self._deadline:
            self._reason = "max_hours"
        return self._reason

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # None is one that Python did not set
                signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        if self._reason and self._reason != "max_hours":
            os._exit(128 + number)
        self._reason = signal.Signals(number).name
        if self._inside:
            raise _BreakOff

    def unless_told(self, perform: Callable[[], Result]) -> Result | None:
        """Call a function, but not once there is a reason to stop; None if that was so, or a signal broke it off."""
        if not self._may_break_off:
            return perform()
        try:
            self._inside = True
            if self.reason:
                raise _BreakOff
            result = perform()
            self._inside = False
            return result
        except _BreakOff:
            return None
        finally:
            self._inside = False

    def end(self, step: int) -> None:
        """Raise what ends the program, as the run stopped after ``step`` and has saved it.

        Raises:
          KeyboardInterrupt: it was interrupted.
          PreemptedError: every other reason.
        """
        reason = self.reason or "another process of the run was told to stop"
        said = f"{reason}: step {step} is saved; the same command goes on from there"
        if self.reason == signal.SIGINT.name:
            raise KeyboardInterrupt(said)
        raise PreemptedError(said)
