"""``STATUS.json``: how a run is, for scripts and for people who look in from outside.

    state               starting | training | done | stopped (at stop_at_step) | preempted | interrupted | diverged
                        | stalled | lost (another process) | failed
    step total_steps    the last step that was done, and the last that there is
    saved               the last step that was saved
    reason              why it ended; empty while it trains and when it is done
    restarts            how many processes were there before this one
    start               the step that this one started from
    earlier             how the latest of those before it ended: start, step, state, reason and updated of each
    productive_seconds  in training steps that the run has kept: no start, no compiling, no saving, no sampling, no
                        waiting for data, no step that was lost and done again
    wall_seconds        since the run first began, whether a process ran or not
    begun updated       when that was, and when the file was written, in UTC
    host pid            of the process

The file is replaced as a whole, at most every few seconds and at every change of the state; of several processes the
first writes it. One that says ``training`` and is old is of a process that was killed.
"""

import contextlib
import json
import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dit_jax import processes
from dit_jax.errors import DivergedError, PreemptedError, Told
from dit_jax.files import read_json, write_whole
from dit_jax.workdir import STATUS

EVERY = 5.0  # seconds between two writes of one state
EARLIER = 50  # processes that are remembered
REMEMBERED = ("start", "step", "state", "reason", "updated")  # of each
ENDS = {DivergedError: "diverged", PreemptedError: "preempted", Told: "preempted", KeyboardInterrupt: "interrupted"}


class Status:
    """The status of a run; enter it when training begins. The exception that it is left by is the reason of the end.

    Args:
      workdir: the run's folder.
      start: the step that this process starts from.
      total_steps: of the run.
      productive: seconds of training until ``start``, as the checkpoint says.
      begun: when this process began, in UTC.
    """

    def __init__(self, workdir: Path, start: int, total_steps: int, productive: float, begun: datetime):
        self._path, self._state = workdir / STATUS, ""
        self.earlier = read_status(workdir)
        self._spent, self._productive, self._written = productive, productive, 0.0
        self._step, self._total, self._saved = start, total_steps, start
        self._restarts = self.earlier["restarts"] + 1 if self.earlier else 0
        self._start, self._ends = start, _ends(self.earlier)
        self._begun = self.earlier.get("begun") or _written(begun)

    def __enter__(self) -> "Status":
        self._write("starting", "")
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if error is None:
            self._write("done" if self._step == self._total else "stopped", "")
            return
        state = "lost" if processes.is_cut(error) else ENDS.get(kind, "failed")
        with contextlib.suppress(OSError):  # of a full disk: the error itself says it
            self._write(state, str(error) or kind.__name__)

    def done(self, step: int, productive: float) -> float:
        """A step was done, after so many seconds of training in this process; returns those of the whole run."""
        self._step, self._productive = step, self._spent + productive
        if self._state != "training" or time.monotonic() - self._written >= EVERY:
            self._write("training", "")
        return self._productive

    def saved(self, step: int) -> None:
        """A step was saved, and is on disk."""
        self._saved = step
        self._write(self._state, "")

    def settle(self) -> None:
        """Nothing is left to do; put right what a process says that did not come to its very end."""
        if self.earlier.get("state") not in ("done", "stopped"):
            self.__exit__(None, None, None)

    def stalled(self, reason: str) -> None:
        """The process is about to be ended by its watchdog."""
        self._write("stalled", reason)

    def _write(self, state: str, reason: str) -> None:
        self._state, self._written = state, time.monotonic()
        if not processes.is_first():
            return
        begun = datetime.fromisoformat(self._begun)
        status = {
            "state": state,
            "step": self._step,
            "total_steps": self._total,
            "saved": self._saved,
            "reason": reason,
            "restarts": self._restarts,
            "start": self._start,
            "earlier": self._ends,
            "productive_seconds": round(self._productive, 3),
            "wall_seconds": round((datetime.now(UTC) - begun).total_seconds(), 3),
            "begun": self._begun,
            "updated": _written(datetime.now(UTC)),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        write_whole(self._path, json.dumps(status, indent=2) + "\n")


def _written(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds")


def _ends(earlier: dict[str, Any]) -> list[Any]:
    """How the processes before this one ended, by what the last of them left."""
    if not earlier:
        return []
    before = earlier.get("earlier")
    last = {key: earlier.get(key) for key in REMEMBERED}
    return [*(before if isinstance(before, list) else []), last][-EARLIER:]


def read_status(workdir: Path) -> dict[str, Any]:
    """The status that an earlier process left; empty if there is none that can be read."""
    try:
        found = read_json(workdir / STATUS)
        datetime.fromisoformat(found["begun"])
        return {**found, "restarts": int(found["restarts"]), "saved": int(found.get("saved", 0))}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
