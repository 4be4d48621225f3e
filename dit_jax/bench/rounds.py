"""Programs compared in one process by turns, since other work on a machine may double the seconds of any of them.

In round r every candidate runs once, beginning with another one each time. What is compared are two candidates of the
same round, so that what slows the machine for longer than a round slows both. The median of those ratios counts, and
the quartiles say how sure it is.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np


class Ratio(NamedTuple):
    """How many times as long one candidate takes as another: median and quartiles over the rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def interleave(candidates: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of every candidate in every round, ``[rounds]`` each; every one has run once before, unmeasured.

    Args:
      candidates: each runs once and returns when the device is done.
      rounds: how often.
    """
    for run in candidates.values():
        run()
    names = list(candidates)
    seconds = {name: np.zeros(rounds) for name in names}
    for r in range(rounds):
        for i in range(len(names)):
            name = names[(r + i) % len(names)]
            begin = time.perf_counter()
            candidates[name]()
            seconds[name][r] = time.perf_counter() - begin
    return seconds


def ratio(seconds: np.ndarray, than: np.ndarray) -> Ratio:
    """``seconds / than``, round by round."""
    low, median, high = np.quantile(seconds / than, [0.25, 0.5, 0.75])
    return Ratio(float(median), float(low), float(high))
