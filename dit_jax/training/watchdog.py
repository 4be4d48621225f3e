"""Ends a run that stands still, and keeps what all threads were doing, for whoever wants to know why.

A step that does not end is a collective that waits for a process that is gone, a driver or a file system that hangs.
Nothing raises an error there, and a machine may stand idle for days. So a thread looks once a second, and when a step
has taken longer than `Watchdog` is patient and than `FACTOR` times the usual step, it writes

    logs/stalled-step<step>-process<i>.txt     the stack of every thread, as `faulthandler` shows it

and ends the process with exit code 9, as there is nobody else who could. What comes between steps is not timed: data
have a patience of their own, validation and samples take as long as they take.
"""

import collections
import contextlib
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dit_jax import processes
from dit_jax.errors import LostError

FACTOR = 20  # times the median of the last steps
STEPS = 100  # that the median is taken of
LOOK_EVERY = 1.0  # seconds
LAST_WORDS = 30.0  # seconds


class Watchdog:
    """Watches while it is entered.

    Args:
      patience: seconds that every step may take; 0 watches nothing.
      folder: where the stacks are written; made when it is needed.
      stalled: is told why the process ends, just before, and has `LAST_WORDS` seconds: it may stall too.
    """

    def __init__(self, patience: float, folder: Path, stalled: Callable[[str], None]):
        self._patience, self._folder, self._stalled = patience, folder, stalled
        self._seconds: collections.deque[float] = collections.deque([0.0], maxlen=STEPS)
        self._step, self._since, self._resting = 0, time.monotonic(), 1
        self._ended = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._patience:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()

    def begin(self, step: int) -> None:
        """Step number ``step`` begins; the one before, if there was one, has ended."""
        now = time.monotonic()
        if not self._resting:
            self._seconds.append(now - self._since)
        self._step, self._since, self._resting = step, now, 0

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Time that belongs to no step."""
        begin = time.monotonic()
        self._resting += 1
        try:
            yield
        finally:
            self._since += time.monotonic() - begin
            self._resting -= 1

    def limit(self) -> float:
        """Seconds that the present step may take."""
        return max(self._patience, FACTOR * statistics.median(self._seconds))

    def _watch(self) -> None:
        while not self._ended.wait(min(LOOK_EVERY, self._patience)):
            seconds = time.monotonic() - self._since
            if not self._resting and seconds > (limit := self.limit()):
                self._end(seconds, limit)

    def _end(self, seconds: float, limit: float) -> None:
        path = self._folder / f"stalled-step{self._step}-process{processes.index()}.txt"
        usual = statistics.median(self._seconds)
        reason = (
            f"step {self._step} has not ended after {seconds:.0f} s (the usual one takes {usual:.2g} s, the limit is"
            f" {limit:.0f} s: stall_patience); what all threads are doing is in {path}"
        )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            last_words = threading.Thread(target=self._stalled, args=(reason,), daemon=True)
            last_words.start()
            last_words.join(LAST_WORDS)
        finally:
            print(f"{LostError.kind}: {reason}", file=sys.stderr, flush=True)
            processes.leave(reason, LostError.exit_code)
            os._exit(LostError.exit_code)
