"""What a person wants to know of a set of captioned pictures before a night is spent on it.

`inspect` reads the names and captions of all records and opens their pictures: all of them, or of a large set an evenly
spaced sample, the same on every run. `Report` holds the figures, and its ``lines`` tell them on one screen. Of a record
nothing is kept but a few bytes, so a set may have many millions.
"""

import bisect
import hashlib
import re
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from dit_jax.data.ahead import in_threads
from dit_jax.data.bad_records import too_many
from dit_jax.data.buckets import assign
from dit_jax.data.inspection.contact_sheet import spread
from dit_jax.data.inspection.troubles import EXAMPLES, Tally, Trouble, enumerate_ids, trouble_lines
from dit_jax.data.sources.records import BadRecord, Source
from dit_jax.data.transforms import captions_speak_of_sides
from dit_jax.errors import DataError

CountTokens = Callable[[list[str]], np.ndarray]  # captions -> tokens of each, BOS and EOS included, uncut
Say = Callable[[str], None]

CHUNK = 1024  # captions or pictures that are looked at together
EVERY = 10.0  # seconds between two words on how far it is
WIDTH = 120  # characters of a line; what is longer ends in dots

# How much longer the longer side is where a picture stops to be about square, and where it gets extreme.
SQUARE, EXTREME = 1.25, 2.0
SHAPES = (
    "very tall   over 1:2",
    "tall        4:5 to 1:2",
    "square      4:5 to 5:4",
    "wide        5:4 to 2:1",
    "very wide   over 2:1",
)

# Letters of scripts other than Latin: Greek and what follows, but for Latin letters with accents, punctuation, symbols.
FOREIGN = re.compile(
    "[\u0370-\u1cff\u1f00-\u1fff\u2c80-\u2dff\u3040-\ua71f\ua800-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff]"
)


# --- how things are said ------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """A text that any terminal bears: no line ends, no control characters, no lone surrogates."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def fit(lines: list[str]) -> list[str]:
    """Lines that any terminal bears and that are not too long for it."""
    lines = [printable(line) for line in lines]
    return [line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..." for line in lines]


def share_of(part: int, whole: int, what: str) -> str:
    """``3 of 200 records (1.5%)``."""
    return f"{part:,} of {whole:,} {what} ({_percent(part / whole)})"


def _percent(share: float) -> str:
    """A share in percent that is 0 or 100 only where it is nothing or all."""
    if 0 < share < 0.0005:
        return "<0.1%"
    return ">99.9%" if 0.9995 <= share < 1 else f"{100 * share:.1f}%"


class Progress:
    """Says every so many seconds how far it is."""

    def __init__(self, said: Say):
        self._said, self._last = said, time.monotonic()

    def at(self, done: int, total: int, what: str) -> None:
        """So much of the total is done."""
        if time.monotonic() - self._last >= EVERY:
            self._last = time.monotonic()
            self._said(f"{done:,} of {total:,} {what}")

    def over(self, items: Iterable, total: int, what: str) -> Iterator:
        """The same items."""
        for done, item in enumerate(items):
            self.at(done, total, what)
            yield item


# --- figures ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Captions:
    """Of all captions.

    Attributes:
      count: how many there are.
      distinct: of them, different ones.
      fewest: that a record has; 0 where one has none.
      most: that a record has.
      lacking: records without one.
      of_sides: captions that speak of left or right.
      foreign: captions with letters that are not Latin.
      lengths: how many captions have a number of tokens, begin and end included, by that number.
      cut: captions of more tokens than the text encoder takes.
      lost: the words that the first of those loses.
    """

    count: int
    distinct: int
    fewest: int
    most: int
    lacking: int
    of_sides: int
    foreign: int
    lengths: dict[int, int]
    cut: int
    lost: str

    @property
    def mean_length(self) -> float:
        """Tokens of a caption on average."""
        return sum(length * count for length, count in self.lengths.items()) / self.count

    def quantile(self, share: float) -> int:
        """The smallest number of tokens that so large a share of the captions does not exceed."""
        lengths = sorted(self.lengths)
        reached = np.cumsum([self.lengths[length] for length in lengths])
        return lengths[int(np.searchsorted(reached, share * self.count))]


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
      sizes: height and width of the smallest, the median and the largest, by area.
      enlarged: how many have fewer pixels, in a side, than what they are cut to.
      shapes: by aspect ratio, one group for each of `SHAPES`, all cut to squares.
      buckets: by the bucket that they are put into; none where there are no buckets.
      lost: mean share of the area that squares cut off, and buckets, or squares again where there are none.
    """

    sizes: tuple[tuple[int, int], ...]
    enlarged: int
    shapes: tuple[Group, ...]
    buckets: tuple[Group, ...]
    lost: tuple[float, float]


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
      name: of the source.
      records: in it.
      repeated: ids that several records have, how many.
      repeated_ids: a few of them.
      captions: None where no record has one.
      opened: records whose picture was opened: all, or an evenly spaced sample.
      pictures: None where none of them can be used.
      troubles: of those that cannot, the most frequent kind first.
      image_size, text_length, max_bad_fraction: what the set was held against.
    """

    name: str
    records: int
    repeated: int
    repeated_ids: tuple[str, ...]
    captions: Captions | None
    opened: int
    pictures: Pictures | None
    troubles: tuple[Trouble, ...]
    image_size: int
    text_length: int
    max_bad_fraction: float

    @property
    def bad(self) -> int:
        """Bad records among those that were opened."""
        return sum(trouble.count for trouble in self.troubles)

    @property
    def too_many_bad(self) -> bool:
        """Whether training would stop because of them, if those not opened are as good as the others."""
        return too_many(self.bad * self.records / self.opened, self.max_bad_fraction, self.records)

    def lines(self) -> list[str]:
        """All of it in words, on one screen."""
        lines = [f"{self.name}: {self.records:,} records", *self._caption_lines()]
        if self.repeated:
            ids = enumerate_ids(self.repeated_ids, self.repeated)
            lines.append(f"  ids        {self.repeated:,} of them stand for several records: {ids}")
        return fit([*lines, *self._picture_lines(), *self._trouble_lines()])

    def _caption_lines(self) -> list[str]:
        if self.captions is None:
            return ["  captions   none"]
        c = self.captions
        per_record = f"{c.fewest:,} to {c.most:,} a record, {c.count / self.records:.1f} on average"
        if c.fewest == c.most:
            per_record = f"{c.most:,} a record"
        lines = [f"  captions   {c.count:,} ({per_record}), {c.distinct:,} of them distinct"]
        if c.lacking:
            lines.append(f"  lacking    {share_of(c.lacking, self.records, 'records')} have no caption")
        lines.append(
            f"  tokens     shortest {c.quantile(0):,}, mean {c.mean_length:.1f}, median {c.quantile(0.5):,}, "
            f"95% have at most {c.quantile(0.95):,}, longest {c.quantile(1):,}; begin and end included"
        )
        if c.cut:
            cut = share_of(c.cut, c.count, "captions")
            lines.append(f"  cut        {cut} have more than {self.text_length} tokens")
            lines.append(f"             the first of them loses: {c.lost}")
        else:
            lines.append(f"  cut        none has more than the {self.text_length} tokens of the text encoder")
        if c.of_sides:
            sides = share_of(c.of_sides, c.count, "captions")
            sides += " speak of left or right: data.flip=auto mirrors no picture"
        else:
            sides = "none speaks of left or right: data.flip=auto mirrors half of the pictures"
        lines.append(f"  sides      {sides}")
        if c.foreign:
            foreign = share_of(c.foreign, c.count, "captions")
            lines.append(f"  scripts    {foreign} have letters that are not Latin; CLIP reads English")
        return lines

    def _picture_lines(self) -> list[str]:
        sampled = f"{self.opened:,} of {self.records:,}, evenly spaced,"
        lines = [f"pictures: {f'all {self.records:,}' if self.opened == self.records else sampled} were opened"]
        if self.pictures is None:
            return [*lines, "  sizes      none can be used"]
        p = self.pictures
        usable = self.opened - self.bad
        small, median, large = (f"{width:,} x {height:,}" for height, width in p.sizes)
        lines.append(f"  sizes      smallest {small}, median {median}, largest {large}; width x height")
        what = "their bucket" if p.buckets else f"data.image_size={self.image_size}"
        lines.append(f"  enlarged   {share_of(p.enlarged, usable, 'pictures')} are smaller than {what} in a side")
        lines.append(f"  {'shape':<26}{'pictures':>10}{'share':>9}{'cut off':>9}  (by a square)")
        lines += [_row(group, usable) for group in (*p.shapes, Group("all", usable, p.lost[0])) if group.count]
        if p.buckets:
            lines.append(f"  {'bucket':<26}{'pictures':>10}{'share':>9}{'cut off':>9}")
            lines += [_row(group, usable) for group in (*p.buckets, Group("all", usable, p.lost[1]))]
        return lines

    def _trouble_lines(self) -> list[str]:
        if not self.bad:
            return [f"bad records: none of {self.opened:,}"]
        share = share_of(self.bad, self.opened, "opened")
        verdict = "training would stop" if self.too_many_bad else "training replaces them"
        lines = [f"bad records: {share}; {verdict} (data.max_bad_fraction={self.max_bad_fraction:g})"]
        return [*lines, *trouble_lines(self.troubles)]


# --- looking ------------------------------------------------------------------------------------------------


def inspect(
    source: Source,
    count_tokens: CountTokens,
    text_length: int,
    image_size: int,
    max_bad_fraction: float,
    shapes: tuple[tuple[int, int], ...],
    limit: int,
    threads: int,
    patience: float,
    said: Say,
) -> Report:
    """Looks at a whole set.

    Args:
      source: what to look at.
      count_tokens: of the run's text encoder; called from this thread.
      text_length: S, tokens that the text encoder takes.
      image_size: side of the square that pictures are cut to without buckets.
      max_bad_fraction: share of bad records that training bears.
      shapes: height and width of the buckets, from the tallest to the widest; of one or none nothing is told.
      limit: of a larger set only so many pictures are opened.
      threads: that open pictures.
      patience: seconds to wait for a picture, 0 for ever.
      said: told from time to time how far it is.

    Raises:
      DataError: the source holds no records, its disk fails, or nothing comes from it.
    """
    records = len(source)
    if not records:
        raise DataError(f"{source.name} holds no records")
    progress = Progress(said)
    captions = _look_at_captions(source, count_tokens, text_length, progress)
    repeated, repeated_ids = _repeated_ids(source)
    indices = spread(limit, records)
    sizes, troubles = _open(source, indices, threads, patience, progress)
    pictures = _look_at_sizes(sizes, image_size, shapes if len(shapes) > 1 else ()) if len(sizes) else None
    return Report(
        source.name,
        records,
        repeated,
        repeated_ids,
        captions,
        len(indices),
        pictures,
        troubles,
        image_size,
        text_length,
        max_bad_fraction,
    )


def _look_at_captions(
    source: Source, count_tokens: CountTokens, text_length: int, progress: Progress
) -> Captions | None:
    per_record: Counter[int] = Counter()
    lengths: Counter[int] = Counter()
    hashes = array("Q")
    of_sides = foreign = 0
    example = ""

    def every() -> Iterator[str]:
        for captions in progress.over(source.captions(), len(source), "captions read"):
            per_record[len(captions)] += 1
            yield from captions

    stream = every()
    while chunk := list(islice(stream, CHUNK)):
        counts = np.asarray(count_tokens(chunk))
        lengths.update(counts.tolist())
        if not example and counts.max() > text_length:
            example = chunk[int(np.argmax(counts > text_length))]
        for caption in chunk:
            hashes.append(_hash(caption))
            of_sides += captions_speak_of_sides([caption])
            foreign += not caption.isascii() and FOREIGN.search(caption) is not None
    if not hashes:
        return None
    return Captions(
        count=len(hashes),
        distinct=1 + int(np.count_nonzero(~_repeats(hashes))),
        fewest=min(per_record),
        most=max(per_record),
        lacking=per_record[0],
        of_sides=of_sides,
        foreign=foreign,
        lengths=dict(sorted(lengths.items())),
        cut=sum(count for length, count in lengths.items() if length > text_length),
        lost=_lost_words(example, count_tokens, text_length) if example else "",
    )


def _lost_words(caption: str, count_tokens: CountTokens, text_length: int) -> str:
    """What does not fit, from the beginning of a word; from any character where there is only one word."""
    ends = [word.end() for word in re.finditer(r"\S+", caption)]
    if len(ends) == 1:
        ends = list(range(1, len(caption) + 1))
    fitting = bisect.bisect_right(ends, text_length, key=lambda end: int(count_tokens([caption[:end]])[0]))
    return caption[ends[fitting - 1] if fitting else 0 :].strip()


def _repeated_ids(source: Source) -> tuple[int, tuple[str, ...]]:
    """How many ids several records have, and a few of them."""
    hashes = array("Q", map(_hash, source.ids()))
    repeats = _repeats(hashes)  # and `hashes` is sorted from here on
    repeated = np.unique(np.frombuffer(hashes, np.uint64)[1:][repeats])
    sought, found = set(repeated[:EXAMPLES].tolist()), []
    for id in source.ids() if sought else ():
        if (hash := _hash(id)) in sought:
            sought.remove(hash)
            found.append(id)
    return len(repeated), tuple(found)


def _hash(text: str) -> int:
    """64 bits: among ten million texts two different ones share them once in 400,000 times."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _repeats(hashes: array) -> np.ndarray:
    """Sorts the numbers where they are; then, for all but the first, whether one is as the one before."""
    view = np.frombuffer(hashes, np.uint64)
    view.sort()
    return view[1:] == view[:-1]


def _open(
    source: Source, indices: np.ndarray, threads: int, patience: float, progress: Progress
) -> tuple[np.ndarray, tuple[Trouble, ...]]:
    """Height and width of the usable pictures, int32 ``[n, 2]``, and the troubles of the others."""

    def look(index: int) -> tuple[int, int] | BadRecord:
        try:
            height, width = source[index].image.shape[:2]
        except BadRecord as error:
            return error
        return height, width

    opened = in_threads(look, indices.tolist(), threads, CHUNK, patience, f"opening pictures of {source.name}")
    sizes, tally = array("i"), Tally()
    for found in progress.over(opened, len(indices), "pictures opened"):
        if isinstance(found, BadRecord):
            tally.add(found.id, found.reason)
        else:
            sizes.extend(found)
    return np.asarray(sizes, np.int32).reshape(-1, 2), tally.troubles()


def _look_at_sizes(sizes: np.ndarray, image_size: int, shapes: tuple[tuple[int, int], ...]) -> Pictures:
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


def _row(group: Group, whole: int) -> str:
    shares = f"{_percent(group.count / whole):>9}{_percent(group.lost) if group.count else '-':>9}"
    return f"    {group.name:<24}{group.count:>10,}{shares}"
