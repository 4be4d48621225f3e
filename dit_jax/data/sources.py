"""Sources of captioned pictures: what a source is.

A source is a finite, random-access collection of records. It knows nothing of order, size or batches: ``transforms``
cuts the pictures and ``loader`` decides which record comes when.
"""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np


class Record(NamedTuple):
    """One captioned picture.

    Attributes:
      image: uint8 ``[height, width, 3]``, any size.
      caption: what the picture shows.
      id: a stable name, unique in its source: a relative file name, or ``shapes:<seed>:<i>``.
    """

    image: np.ndarray
    caption: str
    id: str


class BadRecord(Exception):
    """A record that cannot be used: the loader replaces it by another and lists it.

    Attributes:
      id: the record's stable name.
      reason: one line that says what is wrong with it.
    """

    def __init__(self, id: str, reason: str):
        super().__init__(id, reason)
        self.id = id
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}"


class DataError(Exception):
    """The data as a whole cannot be used. The message is for the user; programs print it and exit with 3."""


class Source(Protocol):
    """A finite collection of captioned pictures with random access.

    ``ids``, ``captions`` and ``fingerprint`` are cheap: they decode and draw no picture.
    """

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Record ``index``; raises `BadRecord` where it cannot be used."""
        ...

    def ids(self) -> Iterable[str]:
        """The id of every record, in order."""
        ...

    def captions(self) -> Iterable[str]:
        """The caption of every record, in order."""
        ...

    def fingerprint(self) -> str:
        """Hex digest that changes when the records do; caches and resumed runs compare it."""
        ...
