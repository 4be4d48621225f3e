"""Curves as inline SVG that is as wide as its page.

Paths lie in a square of `SIDE` units that is stretched over the plot; lines keep their width, and what is written
stands beside it at percentages, in the size of the page's text. So a chart needs no script, and is legible at every
width.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from dit_jax.metrics.report.curves import Point

SIDE = 1000
X_TICKS, Y_TICKS = 5, 5


class Line(NamedTuple):
    """A curve in a chart.

    Attributes:
      name: for readers; empty for a curve that only accompanies another.
      style: a class of the page: its colour and width.
      points: by x.
      dots: whether every point is marked.
    """

    name: str
    style: str
    points: Sequence[Point]
    dots: bool = False


class Mark(NamedTuple):
    """Something that happened at an x."""

    style: str
    x: float
    said: str


class Axis(NamedTuple):
    """From where to where an axis goes, and whether in equal factors or in equal differences."""

    low: float
    high: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Of a value, in [0, 1] where it is between the ends."""
        return float(self.places([value])[0])

    def places(self, values: Sequence[float]) -> np.ndarray:
        """Of many values."""
        low, high, at = (np.log10(v) if self.logarithmic else np.asarray(v) for v in (self.low, self.high, values))
        return (at - low) / (high - low)

    def ticks(self, most: int) -> list[float]:
        """Round numbers between the ends."""
        return _decades(self.low, self.high, most) if self.logarithmic else _round(self.low, self.high, most)


def axis_of(values: Sequence[float], logarithmic: bool = False, zero: bool = False) -> Axis:
    """An axis that has room for all values; ``zero``: and for 0."""
    low, high = min(values), max(values)
    if logarithmic:
        low, high = (low, high) if high > low * 1.05 else (low / 1.5, high * 1.5)
        room = (high / low) ** 0.04
        return Axis(low / room, high * room, True)
    low, high = (min(low, 0.0), max(high, 0.0)) if zero else (low, high)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
    room = 0.06 * (high - low)
    return Axis(low if zero and low == 0 else low - room, high + room)


def draw(x: Axis, y: Axis, lines: Sequence[Line], marks: Sequence[Mark], label: str, units: tuple[str, str]) -> str:
    """An ``<svg>`` with axes, grid, marks and curves.

    Args:
      x, y: the axes.
      lines: later ones lie above.
      marks: at values of x.
      label: what there is to see, for those who do not.
      units: of x and y.
    """
    parts = [f'<svg class="chart" role="img" aria-label="{escape(label)}">']
    for tick in y.ticks(Y_TICKS):
        at = f"{100 * (1 - y.place(tick)):.2f}%"
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="tick" x="-8" y="{at}" dy=".32em" text-anchor="end">{brief(tick)}</text>')
    for tick in x.ticks(X_TICKS):
        at = f"{100 * x.place(tick):.2f}%"
        parts.append(f'<text class="tick" x="{at}" y="100%" dy="1.5em" text-anchor="middle">{brief(tick)}</text>')
    parts.append('<line class="base" x1="0" x2="100%" y1="100%" y2="100%"/>')
    parts.append(f'<text class="unit" x="100%" y="100%" dy="2.9em" text-anchor="end">{escape(units[0])}</text>')
    parts.append(f'<text class="unit" x="-8" y="0" dy="-0.9em">{escape(units[1])}</text>')
    for mark in marks:
        at = f"{100 * x.place(mark.x):.2f}%"
        title = f"<title>{escape(mark.said)}</title>"
        parts.append(f'<line class="mark {mark.style}" x1="{at}" x2="{at}" y1="0" y2="100%">{title}</line>')
    parts.append(f'<svg class="lines" viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" aria-hidden="true">')
    parts += [f'<path class="line {line.style}" d="{_path(x, y, line.points)}"/>' for line in lines]
    parts.append("</svg>")
    for line in lines:
        for a, b in line.points if line.dots else ():
            where = f'cx="{100 * x.place(a):.2f}%" cy="{100 * (1 - y.place(b)):.2f}%"'
            parts.append(f'<circle class="dot {line.style}" r="2.6" {where}/>')
    parts.append("</svg>")
    return "".join(parts)


def _path(x: Axis, y: Axis, points: Sequence[Point]) -> str:
    if not points:
        return ""
    across, up = zip(*points, strict=True)
    at = np.stack([SIDE * x.places(across), SIDE * (1 - y.places(up))], axis=1).round(1).tolist()
    return "M" + "L".join(f"{a} {b}" for a, b in at)


def _round(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * times for times in (1, 2, 5, 10) if (high - low) / (power * times) <= most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [step * i if i else 0.0 for i in range(first, last + 1)]


def _decades(low: float, high: float, most: int) -> list[float]:
    """Powers of ten; with 2 and 5 times, or all digits, where there are few of them; else every second or third."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for digits in ((1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 5), (1, 3), (1,)):
        found = [d * 10.0**e for e in range(first, last + 1) for d in digits if low <= d * 10.0**e <= high]
        if len(found) <= most + 1:
            return found if len(found) > 1 else _round(low, high, most)
    return found[:: -(-len(found) // most)]


def brief(value: float) -> str:
    """A number as it stands at an axis: ``0``, ``0.05``, ``250``, ``1.5k``, ``2M``, ``3e-05``."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= abs(value) < 1e15:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"
