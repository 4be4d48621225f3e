"""A run that is killed or told to stop at any moment loses little, needs no human, and ends as one that was not.

The quick test strikes one run seven times, those of the soak strike many runs ten times each.
"""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM, SIGUSR1, Signals

import pytest

from tests.soak.program import Plan
from tests.soak.strikes import PHASES, Strike, spread
from tests.soak.survival import Outcome, Survivor, summary

SHORT = Plan(total=60, save=10, sample=20, validate=0)
LONG = Plan(total=300, save=20, sample=60, validate=50)
READING = ({}, {"data.encode": "every_step", "data.workers": "2"})
SEED = 0
ROUND = 10  # strikes of a run


def test_a_run_that_is_struck_seven_times_ends_as_one_that_is_not(tmp_path):
    """Where it hurts most. A start is most of what a strike costs, so that here are few."""
    choose, run = random.Random(SEED), Survivor(tmp_path / "run", SHORT, {}, {})
    for strike in (
        Strike((SIGINT,), "compile", 0),
        Strike((SIGKILL,), "before the rename", 11),
        Strike((SIGUSR1,), "sampling", 12),
        Strike((SIGKILL,), "deletion", 25),
        Strike((SIGTERM, SIGTERM), "save", 35),
        Strike((SIGKILL,), "after the rename", 40),
        Strike((SIGKILL,), "end", 0),
    ):
        assert run.suffers(strike, choose), strike
    run.ends_like(Survivor(tmp_path / "whole", SHORT, {}, {}).ends())


@pytest.mark.soak
def test_fifty_kills(tmp_path, capsys):
    """In all phases; the last of a run comes at its end."""
    others = [name for name in PHASES if name != "end"]
    with capsys.disabled():
        strike_runs(tmp_path, 50, others, ["end"], [(SIGKILL,)])


@pytest.mark.soak
def test_thirty_signals(tmp_path, capsys):
    """Ten of each; none comes twice."""
    phases = ["start", "encoding", "compile", "step", "save", "sampling", "validation"]
    with capsys.disabled():
        strike_runs(tmp_path, 30, phases, [], [(SIGTERM,), (SIGINT,), (SIGUSR1,)])


@pytest.mark.soak
def test_ten_signals_that_come_twice(tmp_path, capsys):
    """Where there is something to save, so that the program is still there when the second comes."""
    phases = ["step", "save", "save begins", "sampling", "validation"]
    with capsys.disabled():
        strike_runs(tmp_path, 10, phases, [], [(SIGTERM, SIGTERM), (SIGINT, SIGINT), (SIGTERM, SIGUSR1)])


def strike_runs(
    folder: Path, count: int, phases: Sequence[str], last: Sequence[str], signals: Sequence[tuple[Signals, ...]]
) -> None:
    """Strike runs, each ten times, until so many strikes fell, and hold each run to one that was left alone.

    Every other run reads its data with workers. Each has a compile cache of its own, in which its first start finds
    nothing, and the next what a killed one left.

    Args:
      folder: for the runs.
      count: of strikes.
      phases: all in turn, in random order, again and again.
      last: the phases of the last strikes of every run.
      signals: in turn.
    """
    choose = random.Random(SEED)
    wholes = [Survivor(folder / f"whole{i}", LONG, changes, {}).ends() for i, changes in enumerate(READING)]
    order = itertools.chain.from_iterable(choose.sample(phases, len(phases)) for _ in itertools.count())
    outcomes: list[Outcome] = []
    starts = 0
    for number in itertools.count():
        wanted = min(ROUND, count - len(outcomes))
        if not wanted:
            break
        names = [*itertools.islice(order, wanted - len(last)), *last]
        turns = itertools.islice(itertools.cycle(signals), len(outcomes), len(outcomes) + wanted)
        cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / f"cache{number}")}
        run = Survivor(folder / f"run{number}", LONG, READING[number % 2], cache)
        for strike in spread(names, list(turns), LONG.total, choose):
            if not run.suffers(strike, choose):
                break
        run.ends_like(wholes[number % 2])
        outcomes, starts = outcomes + run.outcomes, starts + run.starts
        print(f"\n{len(outcomes)} of {count}:", *run.outcomes, sep="\n  ")
    print(summary(outcomes, starts, SEED))
    assert {outcome.strike.phase for outcome in outcomes if outcome.hit} == {*phases, *last}
