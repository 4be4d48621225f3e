"""What a person wants to know of a set of captioned pictures before a night is spent on it.

`inspect` reads the captions of all records and opens their pictures: all of them, or of a large set an evenly spaced
sample, the same on every run. `Report` holds the figures, and its ``lines`` tell them on one screen.
"""

from dataclasses import dataclass

from dit_jax.data.inspection.captions import Captions, CountTokens, look_at_captions
from dit_jax.data.inspection.contact_sheet import spread
from dit_jax.data.inspection.pictures import Pictures, look_at_sizes, open_pictures
from dit_jax.data.inspection.troubles import Trouble, bad_records_verdict, trouble_lines
from dit_jax.data.inspection.words import Progress, Say, fit, share_of
from dit_jax.data.sources.records import Source
from dit_jax.errors import DataError


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
      name: of the source.
      records: in it.
      captions: None where no record has one.
      opened: records whose picture was opened: all, or an evenly spaced sample.
      pictures: None where none of them can be used.
      troubles: of those that cannot, the most frequent kind first.
      max_bad_fraction: share of bad records that training bears.
    """

    name: str
    records: int
    captions: Captions | None
    opened: int
    pictures: Pictures | None
    troubles: tuple[Trouble, ...]
    max_bad_fraction: float

    @property
    def bad(self) -> int:
        """Bad records among those that were opened."""
        return sum(trouble.count for trouble in self.troubles)

    def lines(self) -> list[str]:
        """All of it in words, on one screen."""
        whole = self.opened == self.records
        some = f"all {self.records:,}" if whole else f"{self.opened:,} of {self.records:,}, evenly spaced,"
        return fit(
            [
                f"{self.name}: {self.records:,} records",
                *(self.captions.lines() if self.captions else ["  captions   none"]),
                f"pictures: {some} were opened",
                *(self.pictures.lines() if self.pictures else ["  sizes      none can be used"]),
                *self._trouble_lines(),
            ]
        )

    def _trouble_lines(self) -> list[str]:
        if not self.bad:
            return [f"bad records: none of {self.opened:,}"]
        share = share_of(self.bad, self.opened, "opened")
        likely = self.bad * self.records / self.opened  # if those not opened are as good as the others
        verdict = bad_records_verdict(likely, self.max_bad_fraction, self.records)
        return [f"bad records: {share}; {verdict}", *trouble_lines(self.troubles)]


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
    captions = look_at_captions(source, count_tokens, text_length, progress)
    indices = spread(limit, records)
    sizes, bad = open_pictures(source, indices, threads, patience, progress)
    pictures = look_at_sizes(sizes, image_size, shapes if len(shapes) > 1 else ()) if len(sizes) else None
    return Report(source.name, records, captions, len(indices), pictures, bad.troubles(), max_bad_fraction)
