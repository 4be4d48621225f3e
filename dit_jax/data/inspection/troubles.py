"""Bad records by kind: how many there are of each, and which are the first."""

import re
from collections import Counter
from dataclasses import dataclass

from dit_jax.data.bad_records import too_many

EXAMPLES = 3  # ids that are named of each kind of trouble
KINDS = 10  # kinds of trouble that are told


@dataclass(frozen=True)
class Trouble:
    """Bad records of one kind: how many, the ids of the first few, and the whole reason of the first."""

    kind: str
    count: int
    ids: tuple[str, ...]
    reason: str


class Tally:
    """Bad records, sorted by kind as they come."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, list[tuple[str, str]]] = {}

    def add(self, id: str, reason: str) -> None:
        """One more; its kind is the reason without what differs from record to record."""
        kind = re.split(r":| \(", reason, maxsplit=1)[0]
        self._counts[kind] += 1
        if self._counts[kind] <= EXAMPLES:
            self._first.setdefault(kind, []).append((id, reason))

    def troubles(self) -> tuple[Trouble, ...]:
        """The kinds, the most frequent first."""
        return tuple(
            Trouble(kind, count, tuple(id for id, _ in self._first[kind]), self._first[kind][0][1])
            for kind, count in self._counts.most_common()
        )


def trouble_lines(troubles: tuple[Trouble, ...]) -> list[str]:
    """Kinds of bad records in words."""
    lines = []
    for trouble in troubles[:KINDS]:
        lines.append(f"  {trouble.count:>8,}   {trouble.kind}: {enumerate_ids(trouble.ids, trouble.count)}")
        if trouble.reason != trouble.kind:
            lines.append(f"             the first: {trouble.reason}")
    if more := sum(trouble.count for trouble in troubles[KINDS:]):
        lines.append(f"  {more:>8,}   of {len(troubles) - KINDS:,} more kinds")
    return lines


def bad_records_verdict(bad: float, max_bad_fraction: float, records: int) -> str:
    """What training would do about so many bad records of a set."""
    verdict = "training would stop" if too_many(bad, max_bad_fraction, records) else "training replaces them"
    return f"{verdict} (data.max_bad_fraction={max_bad_fraction:g})"


def enumerate_ids(ids: tuple[str, ...], count: int) -> str:
    """The first ids of so many."""
    return ", ".join((*ids, "...") if count > len(ids) else ids)
