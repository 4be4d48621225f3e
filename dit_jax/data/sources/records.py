"""Sources of captioned pictures: what a source is, several as one, and parts of one.

A source is a finite, random-access collection of records. It knows nothing of order, size or batches:
``transforms`` cuts the pictures and ``loader`` decides which record comes when.
"""

import hashlib
import itertools
from collections.abc import Iterable, Sequence, Sized
from typing import Literal, NamedTuple, Protocol

import numpy as np


class Record(NamedTuple):
    """One captioned picture.

    Attributes:
      image: uint8 ``[height, width, 3]``, any size.
      captions: one or more; each says what the picture shows.
      id: a stable name of the picture: a relative file name, or ``shapes:<seed>:<i>``.
    """

    image: np.ndarray
    captions: tuple[str, ...]
    id: str


class BadRecord(Exception):
    """A record that cannot be used: the loader replaces it by another and lists it.

    Attributes:
      id: the record's stable name.
      reason: one line that says what is wrong with it, the same on every run.
    """

    def __init__(self, id: str, reason: str):
        super().__init__(id, reason)
        self.id = id
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}"


class Source(Protocol):
    """A finite collection of captioned pictures with random access.

    ``ids``, ``captions`` and ``fingerprint`` are cheap: they decode no file and draw a few pictures at most.
    """

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Record ``index``; raises `BadRecord` where it cannot be used."""
        ...

    def ids(self) -> Iterable[str]:
        """The id of every record, in order."""
        ...

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of a record's picture, without decoding it where that can be; errors as above."""
        ...

    def captions(self) -> Iterable[tuple[str, ...]]:
        """All captions of every record, in order; none where a record has none."""
        ...

    def fingerprint(self) -> str:
        """Hex digest that changes when the records do; caches and resumed runs compare it."""
        ...


# --- several sources as one ---------------------------------------------------------------------------------


class Mixture:
    """Several sources as one: their records one source after the other, in parts that are drawn by weight.

    Args:
      sources: at least one.
      weights: above zero, one per source; only their ratios count.

    Attributes:
      parts: number of records and weight of every source.

    Raises:
      ValueError: a weight is not above zero.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]):
        if not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(f"weights of a mixture are {', '.join(map(str, weights))}; each must be above 0")
        self.name = " + ".join(f"{w:g}*{source.name}" for w, source in zip(weights, sources, strict=True))
        self.parts = [(len(source), weight) for source, weight in zip(sources, weights, strict=True)]
        self._sources = sources
        self._starts = np.cumsum([0, *(len(source) for source in sources)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _at(self, index: int) -> tuple[Source, int]:
        """The source that a record is in, and its index there."""
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._sources[part], index - int(self._starts[part])

    def __getitem__(self, index: int) -> Record:
        source, place = self._at(index)
        return source[place]

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of a record's picture."""
        source, place = self._at(index)
        return source.size(place)

    def ids(self) -> Iterable[str]:
        """The ids of all records."""
        return (id for source in self._sources for id in source.ids())

    def captions(self) -> Iterable[tuple[str, ...]]:
        """All captions of all records."""
        return (captions for source in self._sources for captions in source.captions())

    def fingerprint(self) -> str:
        """That of the sources and of their weights, which say what comes when."""
        return fingerprint_of_mixture([s.fingerprint() for s in self._sources], [weight for _, weight in self.parts])


def fingerprint_of_mixture(fingerprints: Sequence[str], weights: Sequence[float]) -> str:
    """SHA-256 of the fingerprints of what is mixed and of its shares."""
    shares = "".join(f"{weight / sum(weights):.6f}" for weight in weights)
    return hashlib.sha256(("".join(fingerprints) + shares).encode()).hexdigest()


def parts_of(source: Sized) -> list[tuple[int, float]]:
    """Number of records and weight of every part that a source or a cache is drawn from: what is mixed has several."""
    return getattr(source, "parts", [(len(source), 1.0)])


# --- parts of a source --------------------------------------------------------------------------------------


class Subset:
    """Some records of another source, in its order.

    Args:
      source: all records.
      indices: int64, increasing.
      name: what to call it.
    """

    def __init__(self, source: Source, indices: np.ndarray, name: str):
        self.name = name
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        return self._source[int(self._indices[index])]

    def _chosen(self) -> np.ndarray:
        """Which records of the source are chosen, bool."""
        chosen = np.zeros(len(self._source), bool)
        chosen[self._indices] = True
        return chosen

    def ids(self) -> Iterable[str]:
        """The ids of the chosen records."""
        return itertools.compress(self._source.ids(), self._chosen())

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of a chosen record's picture."""
        return self._source.size(int(self._indices[index]))

    def captions(self) -> Iterable[tuple[str, ...]]:
        """All captions of the chosen records."""
        return itertools.compress(self._source.captions(), self._chosen())

    def fingerprint(self) -> str:
        """That of the source and of the choice."""
        return fingerprint_of_choice(self._source.fingerprint(), self._indices)


def fingerprint_of_choice(fingerprint: str, indices: np.ndarray) -> str:
    """SHA-256 of the fingerprint of what is chosen from and the indices, int64, that were chosen."""
    return hashlib.sha256(fingerprint.encode() + indices.tobytes()).hexdigest()


def split(source: Source, fraction: float, part: Literal["train", "validation"]) -> Subset:
    """Takes the training or the validation part of a source; see `split_indices`."""
    indices = split_indices(source.ids(), len(source), fraction, part)
    return Subset(source, indices, f"{source.name}/{part}")


def split_indices(ids: Iterable[str], n: int, fraction: float, part: Literal["train", "validation"]) -> np.ndarray:
    """Which of n records belong to the training or the validation part, increasing int64.

    A record belongs to validation where the hash of its id, read as a number in [0, 1), is below
    ``fraction``. So adding records never moves another one, and a larger fraction only adds
    to the validation part.

    Raises:
      ValueError: ``fraction`` outside [0, 1), or an unknown part.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"validation fraction is {fraction}, must be in [0, 1)")
    if part not in ("train", "validation"):
        raise ValueError(f"unknown part {part!r}, choose 'train' or 'validation'")
    in_validation = np.zeros(n, bool)
    if fraction:  # else ten million hashes for nothing
        in_validation[:] = np.fromiter((_unit_hash(id) < fraction for id in ids), bool, n)
    return np.flatnonzero(in_validation == (part == "validation"))


def first_by_hash(ids: Iterable[str], n: int, count: int) -> np.ndarray:
    """The ``count`` of n records whose hashes of `split_indices` are the smallest, or all: increasing int64.

    Where they are chosen from a validation part, they are a smaller one: what else that holds does not change them.
    """
    hashes = np.fromiter((_unit_hash(id) for id in ids), np.float64, n)
    return np.sort(np.argsort(hashes, kind="stable")[:count])


def _unit_hash(id: str) -> float:
    """A number in [0, 1) that depends on the id alone, on every machine."""
    return int.from_bytes(hashlib.sha256(id.encode("utf-8", "surrogatepass")).digest()[:6]) / 2**48
