"""The training program as a process that is watched from outside, and hurt.

Nothing in the program helps: what it does is seen in what it prints and in what lies in its folder.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dit_jax.training import manifest
from dit_jax.training.saved_steps import ITEMS, UNFINISHED, steps_of

POLL = 0.001  # seconds between two looks
PATIENCE = 600.0  # seconds after which a start that does not do what it should is a failure; machines are busy
NUMBERS = {
    "resumed": re.compile(r"workdir: .*, resuming from step (\d+)$"),
    "step": re.compile(r"step=(\d+)/\d+ "),
    "saving": re.compile(r"saving step=(\d+)"),
    "saved": re.compile(r"saved step=(\d+) "),
}


class Plan(NamedTuple):
    """How many steps a run has, and how many are between two saves, grids of samples, and validations."""

    total: int
    save: int
    sample: int
    validate: int

    def config(self) -> dict[str, str]:
        """The keys of the config that say so."""
        return {
            "total_steps": str(self.total),
            "save_every": str(self.save),
            "sample_every": str(self.sample),
            "validate_every": str(self.validate),
            "data.validation_fraction": "0.2",
            "log_every": "1",  # so that the last step that was done is seen
            "keep_latest": "2",  # so that there is something to delete
        }


class Program:
    """One start of ``python -m dit_jax.main``.

    Attributes:
      workdir: of the run.
      plan: of the run; its flags say the same.
      lines: what was printed so far, warnings and errors too.
      resumed: the step that it goes on from; 0 for a new run, and as long as it has not said so.
      step: the last step that was logged, or that it goes on from.
      saving, saved: the last steps that it called so.
      torn: steps that were there in part when it was started.
    """

    def __init__(self, workdir: Path, plan: Plan, flags: Sequence[str], environment: Mapping[str, str]):
        self.workdir, self.plan = workdir, plan
        self.lines: list[str] = []
        self.resumed = self.step = self.saving = self.saved = 0
        self.torn = incomplete(self.checkpoints)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dit_jax.main", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **environment},
            start_new_session=True,  # a Ctrl-C of who runs the tests is not for it
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        with self._process.stdout as lines:
            for line in lines:
                for name, pattern in NUMBERS.items():
                    if found := pattern.match(line):
                        setattr(self, name, int(found[1]))
                if self.resumed and not self.step:
                    self.step = self.saving = self.saved = self.resumed
                self.lines.append(line.rstrip("\n"))

    # ---- what it does

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def said(self, beginning: str) -> bool:
        """Whether it printed a line that begins so."""
        return any(line.startswith(beginning) for line in list(self.lines))

    @property
    def checkpoints(self) -> Path:
        return self.workdir / "checkpoints"

    def unfinished(self) -> list[Path]:
        """Saves that are being written."""
        return list(self.checkpoints.glob(f"*{UNFINISHED}*"))

    def hashed(self) -> list[Path]:
        """Saves that are written and hashed, and not renamed yet."""
        return [folder for folder in self.unfinished() if (folder / manifest.NAME).exists()]

    def deleting(self) -> list[int]:
        """Steps of which a part is gone by now."""
        return [step for step in incomplete(self.checkpoints) if step not in self.torn]

    def newest(self) -> int:
        """The newest step on disk, 0 if there is none."""
        return max(steps_of(self.checkpoints), default=0)

    def listens(self) -> bool:
        """Whether it has a handler for SIGTERM by now; seen on Linux only."""
        with contextlib.suppress(OSError):
            caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{self._process.pid}/status").read_text(), re.MULTILINE)
            return bool(caught) and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)
        return False

    # ---- what is done to it

    def wait_for(self, condition: Callable[[], bool], seconds: float = PATIENCE) -> bool:
        """Look again and again until it is so, or the program has ended, or the time is over; returns whether it is."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if condition():
                return True
            if self.ended:
                return False
            time.sleep(POLL)
        return False

    def send(self, number: signal.Signals) -> None:
        """To the process and its workers, as terminals and schedulers do; SIGKILL to the process alone."""
        with contextlib.suppress(ProcessLookupError):
            (os.kill if number == signal.SIGKILL else os.killpg)(self._process.pid, number)

    def end(self, seconds: float = PATIENCE) -> int:
        """Wait for its end and return the exit code, minus the number of the signal that killed it.

        Who holds the pipe of its output is waited for too, so that no worker can outlive it unseen.
        """
        try:
            code = self._process.wait(seconds)
            self._reader.join(seconds)
            assert not self._reader.is_alive(), "a process that it started lives on"
            return code
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def __str__(self) -> str:
        return "\n".join(self.lines[-30:])


def incomplete(checkpoints: Path) -> list[int]:
    """Steps that are there in part."""
    found = []
    for step in steps_of(checkpoints):
        with contextlib.suppress(OSError):  # by now it is gone
            if not {*ITEMS, manifest.NAME} <= set(os.listdir(checkpoints / str(step))):
                found.append(step)
    return found
