"""What the pictures of a data set are like: how large, of which shapes, and what cropping takes from them."""

from array import array
from dataclasses import dataclass

import numpy as np

from dit_jax.data.ahead import in_threads
from dit_jax.data.buckets import assign
from dit_jax.data.inspection.troubles import Tally
from dit_jax.data.inspection.words import Progress, percent, share_of
from dit_jax.data.sources.records import BadRecord, Source

AHEAD = 1024  # pictures that may be opened before their turn

# How much longer the longer side is where a picture stops to be about square, and where it gets extreme.
SQUARE, EXTREME = 1.25, 2.0
SHAPES = (
    "very tall   over 1:2",
    "tall        4:5 to 1:2",
    "square      4:5 to 5:4",
    "wide        5:4 to 2:1",
    "very wide   over 2:1",
)


@dataclass(frozen=True)
class Group:
    """Pictures of one kind: how many, and the mean share of their area that is cut off."""

    name: str
    count: int
    lost: float


@dataclass(frozen=True)
class Pictures:
    """Of the usable pictures among those that were opened.

    Attributes:
      image_size: side of the square that they are cut to without buckets.
      sizes: height and width of the smallest, the median and the largest, by area.
      enlarged: how many have fewer pixels, in a side, than what they are cut to.
      shapes: by aspect ratio, one group for each of `SHAPES`, all cut to squares.
      buckets: by the bucket that they are put into; none where there are no buckets.
      lost: mean share of the area that squares cut off, and buckets, or squares again where there are none.
    """

    image_size: int
    sizes: tuple[tuple[int, int], ...]
    enlarged: int
    shapes: tuple[Group, ...]
    buckets: tuple[Group, ...]
    lost: tuple[float, float]

    @property
    def count(self) -> int:
        """How many they are."""
        return sum(group.count for group in self.shapes)

    def lines(self) -> list[str]:
        """All of it in words."""
        small, median, large = (f"{width:,} x {height:,}" for height, width in self.sizes)
        what = "their bucket" if self.buckets else f"data.image_size={self.image_size}"
        lines = [
            f"  sizes      smallest {small}, median {median}, largest {large}; width x height",
            f"  enlarged   {share_of(self.enlarged, self.count, 'pictures')} are smaller than {what} in a side",
            f"  {'shape':<26}{'pictures':>10}{'share':>9}{'cut off':>9}  (by a square)",
            *(self._row(group) for group in self.shapes if group.count),
            self._row(Group("all", self.count, self.lost[0])),
        ]
        if self.buckets:
            lines.append(f"  {'bucket':<26}{'pictures':>10}{'share':>9}{'cut off':>9}")
            lines += [self._row(group) for group in (*self.buckets, Group("all", self.count, self.lost[1]))]
        return lines

    def _row(self, group: Group) -> str:
        shares = f"{percent(group.count / self.count):>9}{percent(group.lost) if group.count else '-':>9}"
        return f"    {group.name:<24}{group.count:>10,}{shares}"


def open_pictures(
    source: Source, indices: np.ndarray, threads: int, patience: float, progress: Progress
) -> tuple[np.ndarray, Tally]:
    """Height and width of the usable pictures among some records, int32 ``[n, 2]``, and the others by kind.

    Raises:
      DataError: no picture came for ``patience`` seconds, or the disk fails.
    """

    def look(index: int) -> tuple[int, int] | BadRecord:
        try:
            height, width = source[index].image.shape[:2]
        except BadRecord as error:
            return error
        return height, width

    opened = in_threads(look, indices.tolist(), threads, AHEAD, patience, f"opening pictures of {source.name}")
    sizes, bad = array("i"), Tally()
    for found in progress.over(opened, len(indices), "pictures opened"):
        if isinstance(found, BadRecord):
            bad.add(found.id, found.reason)
        else:
            sizes.extend(found)
    return np.asarray(sizes, np.int32).reshape(-1, 2), bad


def look_at_sizes(sizes: np.ndarray, image_size: int, shapes: tuple[tuple[int, int], ...]) -> Pictures:
    """What pictures of these sizes lose, ``[n, 2]``, n at least 1; shapes are those of the buckets, if there are."""
    squares = np.full_like(sizes, image_size)
    buckets = assign(sizes, shapes) if shapes else None
    targets = squares if buckets is None else np.asarray(shapes, np.int32)[buckets]
    by_area = np.argsort(sizes.prod(axis=1, dtype=np.int64), kind="stable")
    places = by_area[[0, (len(sizes) - 1) // 2, -1]]
    elongation = sizes.max(axis=1) / sizes.min(axis=1)
    steps = (elongation > SQUARE).astype(int) + (elongation > EXTREME)
    shape = len(SHAPES) // 2 + np.where(sizes[:, 1] > sizes[:, 0], steps, -steps)
    lost, lost_in_buckets = _cut_off(sizes, squares), _cut_off(sizes, targets)
    names = [f"{width} x {height}" for height, width in shapes]
    return Pictures(
        image_size=image_size,
        sizes=tuple((height, width) for height, width in sizes[places].tolist()),
        enlarged=int((sizes < targets).any(axis=1).sum()),
        shapes=tuple(_group(name, lost[shape == i]) for i, name in enumerate(SHAPES)),
        buckets=tuple(_group(name, lost_in_buckets[buckets == i]) for i, name in enumerate(names)),
        lost=(float(lost.mean()), float(lost_in_buckets.mean())),
    )


def _group(name: str, lost: np.ndarray) -> Group:
    return Group(name, len(lost), float(lost.mean()) if len(lost) else 0.0)


def _cut_off(sizes: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Share of each picture's area outside the largest rectangle of its target's shape, ``[n]``."""
    scale = (sizes / targets).min(axis=1)  # of the target, so that it just fits
    kept = scale**2 * targets.prod(axis=1, dtype=np.int64) / sizes.prod(axis=1, dtype=np.int64)
    return np.maximum(1 - kept, 0).round(9)  # what float64 leaves of nothing is nothing
