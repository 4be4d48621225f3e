"""When the program is hurt: what it is in the middle of, recognised from outside, and a random moment in that."""

import random
import signal
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tests.soak.program import Program

AGAIN = 0.05  # seconds between two signals, to one who has not ended yet


class Phase(NamedTuple):
    """Something that the program does.

    Attributes:
      now: whether it does it.
      seconds: the strike comes at a random moment in so many, counted from when it began. 0 is at once, for what is
        over in a few milliseconds.
      in_loop: whether it comes again and again, so that a strike may wait for a step.
    """

    now: Callable[[Program], bool]
    seconds: float
    in_loop: bool


def _begun(program: Program, every: int, done: str) -> bool:
    """Whether it has logged a step at which something is due, and not yet that this is done."""
    step = program.step
    return (step % every == 0 or step == program.plan.total) and not program.said(done.format(step))


PHASES = {
    "start": Phase(lambda p: not p.lines, 2.5, False),
    "encoding": Phase(lambda p: p.said("encoding ") and not p.said("compiling "), 0.8, False),
    "compile": Phase(lambda p: p.said("compiling ") and not p.said("compiled "), 2.0, False),
    "step": Phase(lambda p: not p.unfinished(), 0.1, True),
    "save begins": Phase(lambda p: bool(p.unfinished()), 0.0, True),
    "save": Phase(lambda p: bool(p.unfinished()), 0.2, True),
    "before the rename": Phase(lambda p: bool(p.hashed()), 0.0, True),
    "after the rename": Phase(lambda p: p.newest() > p.saved, 0.0, True),
    "deletion": Phase(lambda p: bool(p.deleting()), 0.0, True),
    "sampling": Phase(lambda p: _begun(p, p.plan.sample, "samples of step {}:"), 0.1, True),
    "validation": Phase(lambda p: _begun(p, p.plan.validate, "validation step={} "), 0.01, True),
    "end": Phase(lambda p: p.saving == p.plan.total, 0.3, False),
}


class Strike(NamedTuple):
    """Signals, one soon after the other, in a phase; in one of the loop, not before step ``after``."""

    signals: tuple[signal.Signals, ...]
    phase: str
    after: int

    def __str__(self) -> str:
        what = " and ".join(number.name for number in self.signals)
        return f"{what} in {self.phase}" + (f" after step {self.after}" if self.after else "")

    def now(self, program: Program) -> bool:
        """Whether the program is where the strike is to hit it."""
        phase = PHASES[self.phase]
        if phase.in_loop and program.step < max(self.after, program.resumed + 1):
            return False
        if self.signals[0] != signal.SIGKILL and not program.lines and not program.listens():
            return False  # who has only begun to be is killed by any signal, as nothing of ours runs yet
        return phase.now(program)

    def falls(self, program: Program, choose: random.Random) -> bool | None:
        """Wait for the moment and strike; returns whether the phase was not over. None: the program came to its end."""
        if not program.wait_for(lambda: self.now(program)):
            return None
        program.wait_for(lambda: not self.now(program), choose.uniform(0, PHASES[self.phase].seconds))
        if program.ended:
            return None
        hit = self.now(program)
        for i, number in enumerate(self.signals):
            if i:
                program.wait_for(lambda: False, AGAIN)
            program.send(number)
        return hit


def spread(
    phases: Sequence[str], signals: Sequence[tuple[signal.Signals, ...]], total: int, choose: random.Random
) -> list[Strike]:
    """Strikes in these phases, one after the other, spread over the steps of a run."""
    part = total / (len(phases) + 1)
    return [
        Strike(numbers, phase, int(part * (i + choose.random())) if PHASES[phase].in_loop else 0)
        for i, (phase, numbers) in enumerate(zip(phases, signals, strict=True))
    ]
