"""A run that is struck again and again, started again each time by the same command, and held to what was promised."""

import random
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dit_jax.training.checkpoint import UNFINISHED
from tests.soak.program import Program, incomplete
from tests.soak.strikes import PHASES, SAMPLE, SAVE, TOTAL, VALIDATE, Strike, wait_for
from tests.test_train import assert_same_run
from tests.tiny_run import tiny_flags

CONFIG = {
    "total_steps": str(TOTAL),
    "log_every": "1",  # so that the last step that was done is seen
    "save_every": str(SAVE),
    "sample_every": str(SAMPLE),
    "validate_every": str(VALIDATE),
    "keep_latest": "2",  # so that there is something to delete
    "data.validation_fraction": "0.2",
}


class Outcome(NamedTuple):
    """What came of a strike.

    Attributes:
      strike: that hit.
      hit: whether the program was still in the phase.
      code: the exit code.
      unfinished, torn: saves that were left unfinished, and steps that were left half deleted.
      lost: steps that were done and are done again; None until the next start says where it goes on.
    """

    strike: Strike
    hit: bool
    code: int
    unfinished: int
    torn: int
    lost: int | None


class Survivor:
    """A run and what it owes to whoever struck it.

    Args:
      workdir: of the run.
      changes: of the config, with double underscores for dots.
      environment: of the process.
    """

    def __init__(self, workdir: Path, changes: Mapping[str, str], environment: Mapping[str, str]):
        self.workdir, self._environment = workdir, environment
        self._flags = tiny_flags(workdir, **CONFIG | dict(changes))
        self.outcomes: list[Outcome] = []
        self.starts = 0
        self._done = self._owed = 0  # the last step that was seen done, and the first that the next start may begin at

    def start(self) -> Program:
        """Start it by the same command as ever."""
        self.starts += 1
        return Program(self.workdir, self._flags, self._environment)

    def suffers(self, strike: Strike, choose: random.Random) -> bool:
        """Start it and strike; returns whether the strike came before the run was over."""
        program = self.start()
        came = wait_for(program, strike, choose)
        hit = came and PHASES[strike.phase].now(program)
        if came:
            program.send(strike.number)
        code = program.end()
        self._check_begin(program)
        if not came or code == 0:  # a signal may come when all is done
            assert code == 0 and program.newest() == TOTAL, f"not ended by {strike}, but by {code}:\n{program}"
            self._done = self._owed = TOTAL
            return False
        if strike.number == signal.SIGKILL:
            assert code == -signal.SIGKILL, f"{strike} ended with {code}:\n{program}"
        self._done = max(self._done, program.step)
        unfinished = list(program.checkpoints.glob(f"*{UNFINISHED}*"))
        # all but the last save are done; that one may have been lost, and the steps made while it was being written
        while_saving = program.step - program.saving if program.newest() < program.saving else 0
        self._owed = max(self._owed, program.saved, program.step - SAVE - while_saving)
        self.outcomes.append(
            Outcome(strike, hit, code, len(unfinished), len(incomplete(program.checkpoints)), None)
        )
        return True

    def _check_begin(self, program: Program) -> None:
        """Hold a start to what the one before it had done, if it came so far as to say where it begins."""
        if not program.said("workdir: "):
            return
        assert program.resumed >= self._owed, f"{self._owed} was owed:\n{program}"
        if self.outcomes and self.outcomes[-1].lost is None:
            self.outcomes[-1] = self.outcomes[-1]._replace(lost=self._done - program.resumed)
        self._done = self._owed = program.resumed

    def ends_like(self, other: Path) -> None:
        """Start it a last time, let it end, and compare it with a run that nobody struck."""
        program = self.start()
        code = program.end()
        assert code == 0, f"a start ended with {code}:\n{program}"
        self._check_begin(program)
        assert_same_run(other, self.workdir, TOTAL)
        assert files(self.workdir) == files(other)


def files(workdir: Path) -> dict[str, bytes]:
    """What lies in a workdir, and what of it is to be the same in every life of a run: all but its own name and times."""
    found = {}
    for path in sorted(workdir.rglob("*")):
        name = path.relative_to(workdir).as_posix()
        if path.is_file() and not name.startswith(("checkpoints/", "tb/")):
            found[name] = b"" if name == "timing.jsonl" else path.read_bytes()
    return found | {f"checkpoints/{path.name}": b"" for path in (workdir / "checkpoints").iterdir()}


def summary(outcomes: Sequence[Outcome], starts: int, seed: int) -> str:
    """What was done and what came of it, in a few lines."""
    aimed = Counter(outcome.strike.phase for outcome in outcomes)
    hit = Counter(outcome.strike.phase for outcome in outcomes if outcome.hit)
    lost = [outcome.lost for outcome in outcomes if outcome.lost is not None]
    return "\n".join(
        [
            f"seed {seed}: {len(outcomes)} strikes, {starts} starts, 0 hands needed; steps lost: at most {max(lost)},"
            f" {sum(lost) / len(lost):.1f} on average (saved every {SAVE}); found after them:"
            f" {sum(outcome.unfinished for outcome in outcomes)} unfinished saves,"
            f" {sum(outcome.torn for outcome in outcomes)} half-deleted steps",
            "hit of aimed: " + ", ".join(f"{name} {hit[name]}/{count}" for name, count in aimed.items()),
        ]
    )
