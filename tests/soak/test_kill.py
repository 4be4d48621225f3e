"""Kill -9 at any moment loses little, needs no human, and leaves no trace in what the run becomes."""

import itertools
import random
import signal

import pytest

from tests.soak.strikes import PHASES, spread
from tests.soak.survival import Survivor, summary

SEED = 0
KILLS, ROUND = 50, 10
WORKERS = {"data.encode": "every_step", "data.workers": "2"}


def undisturbed(folder, changes):
    run = Survivor(folder, changes, {})
    assert run.start().end() == 0
    return folder


@pytest.mark.soak
def test_fifty_kills(tmp_path, capsys):
    """Rounds of ten, each a run of its own whose last kill is at its end; every other one reads with workers."""
    choose = random.Random(SEED)
    others = [name for name in PHASES if name != "end"]
    order = itertools.chain.from_iterable(choose.sample(others, len(others)) for _ in itertools.count())
    references = [undisturbed(tmp_path / "whole", {}), undisturbed(tmp_path / "whole_workers", WORKERS)]
    outcomes, starts = [], 0
    for number in itertools.count():
        if len(outcomes) >= KILLS:
            break
        count = min(ROUND, KILLS - len(outcomes))
        phases = [*itertools.islice(order, count - 1), "end"]
        # a compile cache of its own: the first start, and those that are killed while they compile, find nothing in it
        cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / f"cache{number}")}
        run = Survivor(tmp_path / f"run{number}", WORKERS if number % 2 else {}, cache)
        for strike in spread(phases, [signal.SIGKILL] * count, choose):
            if not run.suffers(strike, choose):
                break
        run.ends_like(references[number % 2])
        outcomes += run.outcomes
        starts += run.starts
        with capsys.disabled():
            print(f"\n{len(outcomes)} kills: " + "; ".join(f"{o.strike}{'' if o.hit else ' (just over)'}, lost {o.lost}" for o in run.outcomes))
    with capsys.disabled():
        print("\n" + summary(outcomes, starts, SEED))
    assert len(outcomes) == KILLS
