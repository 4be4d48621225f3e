"""How what a run wrote stands on its page: cut to a length, escaped where it becomes HTML."""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from typing import Any

LETTERS = 2_000  # of a value


def absent(why: str) -> str:
    """What stands in a panel that has nothing to show."""
    return f'<p class="absent">{escape(why)}</p>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are escaped; the first of a row names it."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    if not any(head):
        return f'<div class="scroll" tabindex="0"><table class="facts"><tbody>{lines}</tbody></table></div>'
    headed = f"<thead><tr>{top}</tr></thead>"
    return f'<div class="scroll" tabindex="0"><table>{headed}<tbody>{lines}</tbody></table></div>'


def word(value: Any) -> str:
    """A value of the config, as a person would write it."""
    if isinstance(value, list | tuple):
        return cut(", ".join(word(one) for one in value)) or "()"
    return value or '""' if isinstance(value, str) else _literal(value)


def _literal(value: Any) -> str:
    """A number as it is written; all else as JSON."""
    return cut(json.dumps(value))


def score(value: Any) -> str:
    """A value of ``evaluation/``."""
    return f"{value:.4g}" if isinstance(value, float) else cut(value)


def cut(value: Any) -> str:
    """At most `LETTERS` of what a value is written as."""
    text = str(value)
    return text if len(text) <= LETTERS else f"{text[:LETTERS]} ..."


def count(value: Any) -> str:
    """A whole number; what is none is not known."""
    return f"{value:,}" if type(value) is int else "?"


def whole(found: Mapping[str, Any], key: str) -> int:
    """A whole number by its key; 0 where there is none."""
    value = found.get(key)
    return value if type(value) is int and value >= 0 else 0


def short(value: int) -> str:
    """Three digits that count."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return str(value)


def moment(text: Any) -> str:
    """A moment of ``STATUS.json``, to the minute."""
    try:
        return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M} UTC"
    except (TypeError, ValueError):
        return ""


def duration(seconds: float) -> str:
    """As ``3 d 4 h``, ``3 h 12 min``, ``4 min 5 s`` or ``7 s``."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return f"{days} d {h} h" if days else f"{h} h {m} min" if h else f"{m} min {s} s" if m else f"{s} s"
