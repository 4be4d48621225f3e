"""What the captions of a data set are like: how many, how long in tokens, what is cut off, what they speak of.

Of a caption nothing is kept but a few bytes, so a set may have many millions.
"""

import bisect
import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from dit_jax.data.inspection.words import Progress, share_of
from dit_jax.data.sources.records import Source
from dit_jax.data.transforms import captions_speak_of_sides

CountTokens = Callable[[list[str]], np.ndarray]  # captions -> tokens of each, BOS and EOS included, uncut

CHUNK = 1024  # captions whose tokens are counted together


@dataclass(frozen=True)
class Captions:
    """Of all captions.

    Attributes:
      records: of the source.
      count: how many captions there are.
      distinct: of them, different ones.
      fewest: that a record has; 0 where one has none.
      most: that a record has.
      lacking: records without one.
      of_sides: captions that speak of left or right.
      lengths: how many captions have a number of tokens, begin and end included, by that number.
      text_length: S, tokens that the text encoder takes.
      lost: the words that the first caption with more tokens loses; empty where there is none.
    """

    records: int
    count: int
    distinct: int
    fewest: int
    most: int
    lacking: int
    of_sides: int
    lengths: dict[int, int]
    text_length: int
    lost: str

    @property
    def cut(self) -> int:
        """Captions of more tokens than the text encoder takes."""
        return sum(count for length, count in self.lengths.items() if length > self.text_length)

    @property
    def mean_length(self) -> float:
        """Tokens of a caption on average."""
        return sum(length * count for length, count in self.lengths.items()) / self.count

    def quantile(self, share: float) -> int:
        """The smallest number of tokens that so large a share of the captions does not exceed."""
        lengths = sorted(self.lengths)
        reached = np.cumsum([self.lengths[length] for length in lengths])
        return lengths[int(np.searchsorted(reached, share * self.count))]

    def lines(self) -> list[str]:
        """All of it in words."""
        per_record = f"{self.fewest:,} to {self.most:,} a record, {self.count / self.records:.1f} on average"
        if self.fewest == self.most:
            per_record = f"{self.most:,} a record"
        lines = [f"  captions   {self.count:,} ({per_record}), {self.distinct:,} of them distinct"]
        if self.lacking:
            lines.append(f"  lacking    {share_of(self.lacking, self.records, 'records')} have no caption")
        lines.append(
            f"  tokens     shortest {self.quantile(0):,}, mean {self.mean_length:.1f}, "
            f"median {self.quantile(0.5):,}, 95% have at most {self.quantile(0.95):,}, "
            f"longest {self.quantile(1):,}; begin and end included"
        )
        if self.cut:
            cut = share_of(self.cut, self.count, "captions")
            lines.append(f"  cut        {cut} have more than {self.text_length} tokens")
            lines.append(f"             the first of them loses: {self.lost}")
        else:
            lines.append(f"  cut        none has more than the {self.text_length} tokens of the text encoder")
        if self.of_sides:
            sides = share_of(self.of_sides, self.count, "captions")
            lines.append(f"  sides      {sides} speak of left or right: data.flip=auto mirrors no picture")
        else:
            lines.append(
                "  sides      none speaks of left or right: with data.flip=auto half of the pictures are mirrored"
            )
        return lines


def look_at_captions(
    source: Source, count_tokens: CountTokens, text_length: int, progress: Progress
) -> Captions | None:
    """Reads all captions of a source; None where no record has one."""
    per_record: Counter[int] = Counter()
    lengths: Counter[int] = Counter()
    hashes = array("Q")
    of_sides, too_long = 0, ""

    def every() -> Iterator[str]:
        for captions in progress.over(source.captions(), len(source), "captions read"):
            per_record[len(captions)] += 1
            yield from captions

    stream = every()
    while chunk := list(islice(stream, CHUNK)):
        counts = np.asarray(count_tokens(chunk))
        lengths.update(counts.tolist())
        if not too_long and counts.max() > text_length:
            too_long = chunk[int(np.argmax(counts > text_length))]
        for caption in chunk:
            hashes.append(_hash(caption))
            of_sides += captions_speak_of_sides([caption])
    if not hashes:
        return None
    return Captions(
        records=len(source),
        count=len(hashes),
        distinct=len(np.unique(np.frombuffer(hashes, np.uint64))),
        fewest=min(per_record),
        most=max(per_record),
        lacking=per_record[0],
        of_sides=of_sides,
        lengths=dict(sorted(lengths.items())),
        text_length=text_length,
        lost=_lost_words(too_long, count_tokens, text_length) if too_long else "",
    )


def _lost_words(caption: str, count_tokens: CountTokens, text_length: int) -> str:
    """What does not fit, from the beginning of a word; from any character where there is only one word."""
    ends = [word.end() for word in re.finditer(r"\S+", caption)]
    if len(ends) == 1:
        ends = list(range(1, len(caption) + 1))
    fitting = bisect.bisect_right(ends, text_length, key=lambda end: int(count_tokens([caption[:end]])[0]))
    return caption[ends[fitting - 1] if fitting else 0 :].strip()


def _hash(text: str) -> int:
    """64 bits: among ten million texts two different ones share them once in 400,000 times."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())
