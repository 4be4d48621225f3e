"""A run that is struck again and again, started again each time by the same command, and held to what was promised."""

import json
import random
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dit_jax.training.saved_steps import ITEMS, UNFINISHED, verify
from tests.soak.program import Plan, Program, incomplete
from tests.soak.strikes import Strike
from tests.test_train import assert_same_run
from tests.tiny_run import tiny_flags

CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}
HARD = 2.0  # seconds after a second signal


class Outcome(NamedTuple):
    """What came of a strike.

    Attributes:
      strike: that fell.
      hit: whether the program was still in the phase.
      unfinished, torn: saves that were left unfinished, and steps that were left half deleted.
      lost: steps that were done and are done again; None until the next start says where it goes on.
    """

    strike: Strike
    hit: bool
    unfinished: int
    torn: int
    lost: int | None

    def __str__(self) -> str:
        return f"{self.strike}{'' if self.hit else ' (just over)'}: lost {self.lost}"


class Survivor:
    """A run, and what it owes to whoever strikes it.

    Args:
      workdir: of the run.
      plan: of the run.
      changes: of the config, by dotted key.
      environment: of the process.

    Attributes:
      outcomes: of the strikes so far.
      starts: of the program so far.
    """

    def __init__(self, workdir: Path, plan: Plan, changes: Mapping[str, str], environment: Mapping[str, str]):
        self.workdir, self._plan, self._environment = workdir, plan, environment
        self._flags = tiny_flags(workdir, **plan.config() | dict(changes))
        self.outcomes: list[Outcome] = []
        self.starts = 0
        self._done = self._owed = 0  # the last step that was done, and the first that it may go on from

    def suffers(self, strike: Strike, choose: random.Random) -> bool:
        """Start it and strike; returns whether the strike fell before the run was over."""
        program = self.start()
        before = program.newest()
        hit = strike.falls(program, choose)
        at = program.step
        if len(strike.signals) > 1:
            program.wait_for(lambda: False, HARD)
            assert program.ended, f"{strike}: it goes on\n{program}"
        code = program.end()
        self._check_begin(program)
        if hit is None or code == 0:
            assert code == 0 and program.newest() == self._plan.total, f"{strike}: exit code {code}\n{program}"
            assert hit is None or at >= self._plan.total - 1, f"{strike}: it took no notice\n{program}"
            return False
        number = strike.signals[-1]
        assert code == (CODES[number] if len(strike.signals) == 1 else 128 + number), f"{strike}: {code}\n{program}"

        self._done = max(self._done, program.step)
        if strike.signals[1:] or number == signal.SIGKILL:
            # what it called saved; or all but the last save, which may be lost, and the steps made while it was written
            while_saving = program.step - program.saving if program.newest() < program.saving else 0
            owed = max(program.saved, program.step - self._plan.save - while_saving)
        else:
            owed = program.step or before
            assert program.newest() == owed, f"{strike}: saved {program.newest()} of {owed}\n{program}"
            begin = "interrupted" if number == signal.SIGINT else f"preempted: {number.name}"
            told = f": step {owed} is saved" if program.step > program.resumed else ""
            assert program.lines[-1].startswith(begin) and told in program.lines[-1], program
        self._owed = max(self._owed, owed)
        unfinished = len(list(program.checkpoints.glob(f"*{UNFINISHED}*")))
        self.outcomes.append(Outcome(strike, hit, unfinished, len(incomplete(program.checkpoints)), None))
        return True

    def ends(self) -> Path:
        """Start it a last time, and let it end; returns its workdir."""
        program = self.start()
        code = program.end()
        assert code == 0, f"exit code {code}\n{program}"
        self._check_begin(program)
        return self.workdir

    def ends_like(self, other: Path) -> None:
        """The same, and compare it with a run that nobody struck."""
        assert_same_run(other, self.ends(), self._plan.total)
        assert _files(self.workdir) == _files(other)
        names = {path.name for path in (self.workdir / "checkpoints").iterdir()}
        assert names >= {
            path.name for path in (other / "checkpoints").iterdir()
        }  # one more where it was not deleted yet
        for name in names:
            assert not verify(self.workdir / "checkpoints", int(name), "full", ITEMS).problems, name
        assert json.loads((self.workdir / "STATUS.json").read_text())["state"] == "done"

    def start(self) -> Program:
        """Start it, by the same command as ever."""
        self.starts += 1
        return Program(self.workdir, self._plan, self._flags, self._environment)

    def _check_begin(self, program: Program) -> None:
        """Hold a start to what was done before it, if it came so far as to say where it begins."""
        if not program.said("workdir: "):
            return
        assert program.resumed >= self._owed, f"it goes on from {program.resumed}, not {self._owed}\n{program}"
        if self.outcomes and self.outcomes[-1].lost is None:
            self.outcomes[-1] = self.outcomes[-1]._replace(lost=self._done - program.resumed)
        self._done = self._owed = program.resumed


def _files(workdir: Path) -> dict[str, bytes]:
    """What lies in a workdir beside checkpoints and events; with its bytes where every life of a run has the same."""
    found = {}
    for path in sorted(workdir.rglob("*")):
        name = path.relative_to(workdir).as_posix()
        if path.is_file() and not name.startswith(("checkpoints/", "tb/")):
            found[name] = b"" if name in ("timing.jsonl", "STATUS.json", "report.html") else path.read_bytes()
    return found


def summary(outcomes: Sequence[Outcome], starts: int, seed: int) -> str:
    """What was done and what came of it, in a few lines."""
    fell = Counter(outcome.strike.phase for outcome in outcomes)
    hit = Counter(outcome.strike.phase for outcome in outcomes if outcome.hit)
    lost = [outcome.lost for outcome in outcomes if outcome.lost is not None]
    return (
        f"seed {seed}: {len(outcomes)} strikes, {starts} starts, no hand needed\n"
        f"steps lost: {max(lost)} at most, {sum(lost) / len(lost):.1f} on average\n"
        f"found after them: {sum(outcome.unfinished for outcome in outcomes)} unfinished saves,"
        f" {sum(outcome.torn for outcome in outcomes)} half-deleted steps\n"
        "in the phase, of those that were aimed at it: "
        + ", ".join(f"{name} {hit[name]}/{count}" for name, count in sorted(fell.items()))
    )
