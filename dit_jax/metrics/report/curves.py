"""Series of any length in little room: what is kept of one does not grow with the run, and no point is looked at twice.

A `Curve` has at most ``most`` buckets of equally many points, and keeps the least, the largest and the mean of each.
When they are full, neighbours are joined: a bucket then holds twice as many points. So a spike of a single step stays
to be seen, however long the run is, and adding n points costs O(n). `Sparse` keeps every 2^k-th of what it is given,
and the last.
"""

import math
from typing import Any, NamedTuple

import numpy as np

Point = tuple[float, float]  # step and value


class Bucket(NamedTuple):
    """Some points in a row: how many, the sums of their steps and values, and where the least and the largest are."""

    size: int
    steps: float
    total: float
    least: Point
    largest: Point

    def joined(self, other: "Bucket") -> "Bucket":
        """This one and the one after it as one."""
        return Bucket(
            self.size + other.size,
            self.steps + other.steps,
            self.total + other.total,
            self.least if self.least[1] <= other.least[1] else other.least,
            self.largest if self.largest[1] >= other.largest[1] else other.largest,
        )


class Curve:
    """Values by step, thinned.

    Args:
      most: buckets; even.

    Attributes:
      count: how many points there were.
      first, last: points, None before there is one.
    """

    def __init__(self, most: int = 512):
        self._most, self._full = most, 1  # points in a bucket that is full
        self._buckets: list[Bucket] = []
        self.count = 0
        self.first: Point | None = None
        self.last: Point | None = None

    def add(self, step: int, value: float) -> bool:
        """Add a point behind the others; False if its step is not behind them, and it is left out."""
        if self.last is not None and step <= self.last[0]:
            return False
        point = (step, value)
        self.first, self.last = self.first or point, point
        self.count += 1
        new = Bucket(1, step, value, point, point)
        if self._buckets and self._buckets[-1].size < self._full:
            self._buckets[-1] = self._buckets[-1].joined(new)
            return True
        if len(self._buckets) == self._most:
            pairs = zip(self._buckets[::2], self._buckets[1::2], strict=True)
            self._buckets = [one.joined(other) for one, other in pairs]
            self._full *= 2
        self._buckets.append(new)
        return True

    def points(self) -> list[Point]:
        """The least and the largest of every bucket, the first and the last point, by step."""
        ends = [point for point in (self.first, self.last) if point]
        return sorted({point for bucket in self._buckets for point in (bucket.least, bucket.largest)} | set(ends))

    def means(self) -> list[Point]:
        """The mean of every bucket, at the mean of its steps."""
        return [(bucket.steps / bucket.size, bucket.total / bucket.size) for bucket in self._buckets]

    def smooth(self) -> list[Point]:
        """The means, each averaged with its neighbours under a bell of a 50th of the curve; none of a short curve."""
        means = self.means()
        if len(means) < 25:
            return []
        steps, values = np.array(means).T
        sigma = len(means) / 50
        reach = math.ceil(3 * sigma)
        bell = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
        weights = np.convolve(np.ones_like(values), bell, "same")  # at the ends there are fewer neighbours
        averages = np.convolve(values, bell, "same") / weights
        return list(zip(steps.tolist(), averages.tolist(), strict=True))

    def least(self) -> Point | None:
        """The lowest point."""
        return min((bucket.least for bucket in self._buckets), key=lambda point: point[1], default=None)


class Sparse:
    """Some of many things, evenly spread: the first, every 2^k-th and the last, at most ``most`` + 1.

    Attributes:
      count: how many there were.
    """

    def __init__(self, most: int):
        self._most, self._stride, self.count = most, 1, 0
        self._kept: list[Any] = []
        self._last: Any = None

    def add(self, item: Any) -> None:
        """One more."""
        if self.count % self._stride == 0:
            self._kept.append(item)
            if len(self._kept) > self._most:
                self._kept, self._stride = self._kept[::2], 2 * self._stride
        self._last = item
        self.count += 1

    def items(self) -> list[Any]:
        """What is kept, in order."""
        return self._kept if not self._kept or self._kept[-1] is self._last else [*self._kept, self._last]
