"""When the program is hurt: what it is in the middle of, recognised from outside, and a random moment in that."""

import random
import signal
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tests.soak.program import Program

TOTAL, SAVE, SAMPLE, VALIDATE = 300, 20, 60, 50  # steps of the run that is hurt, and between what it does


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
    return (step % every == 0 or step == TOTAL) and not program.said(done.format(step))


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
    "sampling": Phase(lambda p: _begun(p, SAMPLE, "samples of step {}:"), 0.1, True),
    "validation": Phase(lambda p: _begun(p, VALIDATE, "validation step={} "), 0.01, True),
    "end": Phase(lambda p: p.saving == TOTAL, 1.5, False),
}


class Strike(NamedTuple):
    """A signal in a phase; in one of the loop, not before step ``after``."""

    number: signal.Signals
    phase: str
    after: int

    def __str__(self) -> str:
        return f"{self.number.name} in {self.phase}" + (f" after step {self.after}" if self.after else "")


def wait_for(program: Program, strike: Strike, choose: random.Random) -> bool:
    """Returns at the moment of the strike; False if the program ended before it came."""
    phase = PHASES[strike.phase]

    def now() -> bool:
        begun = not phase.in_loop or program.step >= max(strike.after, program.resumed + 1)
        return begun and phase.now(program)

    if not program.wait_for(now):
        return False
    program.wait_for(lambda: not phase.now(program), choose.uniform(0, phase.seconds))
    return not program.ended


def spread(phases: Sequence[str], numbers: Sequence[signal.Signals], choose: random.Random) -> list[Strike]:
    """Strikes in these phases, one after the other, spread over the steps of a run."""
    part = TOTAL / (len(phases) + 1)
    return [
        Strike(number, phase, int(part * (i + choose.random())) if PHASES[phase].in_loop else 0)
        for i, (phase, number) in enumerate(zip(phases, numbers, strict=True))
    ]
