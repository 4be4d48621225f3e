"""How an inspection speaks: shares, lines that any terminal bears, and how far it is."""

import time
from collections.abc import Callable, Iterable, Iterator

Say = Callable[[str], None]

EVERY = 10.0  # seconds between two words on how far it is
WIDTH = 120  # characters of a line; what is longer ends in dots


def printable(text: str) -> str:
    """A text that any terminal bears: no line ends, no control characters, no lone surrogates."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def fit(lines: list[str]) -> list[str]:
    """Lines that any terminal bears and that are not too long for it."""
    lines = [printable(line) for line in lines]
    return [line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..." for line in lines]


def share_of(part: int, whole: int, what: str) -> str:
    """``3 of 200 records (1.5%)``."""
    return f"{part:,} of {whole:,} {what} ({percent(part / whole)})"


def percent(share: float) -> str:
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
