"""The list of a run's bad records: what they are, what stands in for them, and when there are too many."""

import itertools
import json
import os
from pathlib import Path
from typing import NamedTuple

from dit_jax.errors import DataError
from dit_jax.files import read_rows


class Replaced(NamedTuple):
    """A row of ``bad_records.jsonl``: ids of a bad record and of its stand-in, and what is wrong.

    Where records are encoded once and for all, nothing is in place of a bad one yet: ``replaced_by`` is None.
    """

    id: str
    reason: str
    replaced_by: str | None


class BadRecords:
    """Counts bad records, lists each id once in a file, and stops a run that has too many.

    Records are counted by index, since many of them may have one id: a broken file with fifty captions is fifty.

    Args:
      path: ``bad_records.jsonl`` of the run, appended to; None lists nothing.
      max_bad_fraction: the largest share of the source's records that may be bad.
      num_records: length of the source.

    Raises:
      ValueError: ``max_bad_fraction`` is not in [0, 1].
    """

    def __init__(self, path: Path | None, max_bad_fraction: float, num_records: int):
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction is {max_bad_fraction}, must be in [0, 1]")
        self.path = path
        self._max_bad_fraction = max_bad_fraction
        self._num_records = num_records
        self._listed = _listed_ids(path) if path and path.exists() else set()
        self._seen: dict[int, str] = {}  # index -> id and reason, of this process: a resumed run may be repaired

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, index: int, row: Replaced) -> None:
        """Notes that record ``index`` of the source was replaced.

        Raises:
          DataError: more than ``max_bad_fraction`` of the source is bad.
        """
        if index in self._seen:
            return
        self._seen[index] = f"{row.id}: {row.reason}"
        if self.path and row.id not in self._listed:
            self._listed.add(row.id)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row._asdict()) + "\n")
        if too_many(len(self), self._max_bad_fraction, self._num_records):
            first = "; ".join(itertools.islice(dict.fromkeys(self._seen.values()), 3))
            listed = f" (all so far in {self.path})" if self.path else ""
            raise DataError(
                f"{len(self)} of {self._num_records} records are bad, more than "
                f"data.max_bad_fraction={self._max_bad_fraction} allows; the first: {first}{listed}"
            )


def too_many(bad: float, max_bad_fraction: float, num_records: int) -> bool:
    """Whether so many bad records of a source are more than a run bears."""
    allowed = max_bad_fraction * num_records
    return bad > max(allowed, 1 if allowed else 0)  # one is not many, however small the source


def _listed_ids(path: Path) -> set[str]:
    """Ids in an earlier list. A line that a killed process left half-written is closed and forgotten."""
    ids = {row["id"] for _, row in read_rows(path) if isinstance(row.get("id"), str)}
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        if file.read() not in (b"", b"\n"):
            file.write(b"\n")
    return ids
