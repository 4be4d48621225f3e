"""The curves of a run as figures: a caption, the chart, and what a pointer is told of it."""

import json
from collections.abc import Mapping, Sequence
from html import escape

from dit_jax.metrics.report.charts import Axis, Line, Mark, axis_of, brief, draw
from dit_jax.metrics.report.curves import Curve
from dit_jax.metrics.report.record import VALIDATION, Record

LOG_FROM = 8.0  # times the least value is the largest where equal factors say more than equal differences
TOLD = 400  # points of a curve that a pointer is told of

Told = Mapping[str, Sequence[tuple[float, float]]]


def training_loss(record: Record, total: int, marks: Sequence[Mark]) -> str:
    """The loss of training."""
    curve, x = record.curves["loss"], _steps(total, record.last_step)
    said = "of the step itself, over the whole batch; the strong line is its average over a 50th of the curve"
    return _figure("loss", "Training loss", said, _over_steps(curve, "train", x, marks, "loss", "Loss"), _key(marks))


def validation(record: Record, total: int, marks: Sequence[Mark]) -> str:
    """The mean of the validation error over all levels."""
    curve, x = record.curves[VALIDATION], _steps(total, record.last_step)
    least = curve.least()
    said = "error of x0 on records that were set aside, mean over all levels of noise"
    said += f"; least {figure(least[1])} at step {least[0]:,}" if least else ""
    plot = _over_steps(curve, "held", x, marks, "error", "Validation error")
    return _figure("validation", "Validation error", said, plot, _key(marks))


def levels(record: Record, total: int, marks: Sequence[Mark]) -> str:
    """The validation error at every level of noise, over the steps."""
    curves = dict(sorted(record.levels.items()))
    named = {level: f"log-SNR {level}" for level in curves}
    lines = [
        Line(named[level], f"shade{_shade(i, len(curves))}", curve.points(), curve.count < 25)
        for i, (level, curve) in enumerate(curves.items())
    ]
    told = {named[level]: curve.points() for level, curve in curves.items()}
    label = f"Validation error by step at {len(curves)} levels of log-SNR"
    plot = _plots(_steps(total, record.last_step), lines, told, marks, label, ("step", "error"))
    legend = _legend([(f"shade{_shade(i, len(curves))}", str(level)) for i, level in enumerate(curves)], "log-SNR")
    said = "low: nearly all noise, where it is decided what stands where; high: nearly none, sharp edges"
    return _figure("levels", "Error by level of noise", said, plot, legend)


def profiles(record: Record) -> str:
    """The validation error by level of noise, at some steps."""
    found = record.profiles.items()
    axis = axis_of([level for _, profile in found for level in profile])
    lines, told, legend = [], {}, []
    for i, (step, profile) in enumerate(found):
        name, style = f"step {step:,}", f"shade{_shade(i, len(found))}"
        lines.append(Line(name, style, list(profile.items()), i == len(found) - 1))
        told[name] = list(profile.items())
        legend.append((style, brief(step)))
    label = f"Validation error by log-SNR at steps {', '.join(f'{step:,}' for step, _ in found)}"
    plot = _plots(axis, lines, told, (), label, ("log-SNR", "error"))
    said = "each line is one validation: where among noisy and clean pictures the run still learns"
    return _figure("profiles", "Error against noise, over time", said, plot, _legend(legend, "step"))


def speed(record: Record, total: int, marks: Sequence[Mark]) -> str:
    """Pictures a second."""
    curve, x = record.curves["images_per_second"], _steps(total, record.last_step)
    said = "between two rows; saving, sampling and validation do not count, waiting for data does"
    plot = _over_steps(curve, "speed", x, marks, "images/s", "Images per second", zero=True)
    return _figure("speed", "Images per second", said, plot, _key(marks))


def plain(record: Record, name: str, total: int, marks: Sequence[Mark]) -> str:
    """A further curve: its name in the rows, title, unit and what is to be said of it."""
    title, unit, said, scale = PLAIN[name]
    curve, x = record.curves[name], _steps(total, record.last_step)
    plot = _over_steps(curve, "other", x, marks, unit, title, name in FROM_ZERO, scale, name not in CALM)
    return _figure(name, title, said, plot)


PLAIN = {
    "grad_norm": ("Gradient norm", "norm", "before it is clipped", 1.0),
    "learning_rate": ("Learning rate", "rate", "of the schedule, after warm-up", 1.0),
    "loss_scale": ("Loss scale", "factor", "float16 only: falls after an overflow, then grows again", 1.0),
    "data_wait": ("Waiting for data", "% of time", "time in which the step waits for its batch", 100.0),
    "memory_gib": ("Memory", "GiB", "peak in use: of the first device; on a CPU, of the process", 1.0),
    "mfu": (
        "Model FLOPs utilisation",
        "% of peak",
        "analytic cost of the model against what the devices can do",
        100.0,
    ),
}
FROM_ZERO = {"learning_rate", "data_wait", "memory_gib", "mfu"}
CALM = {"learning_rate", "loss_scale", "memory_gib"}


# ------------------------------------------------------------------------------------------------------------- parts


def _over_steps(
    curve: Curve,
    style: str,
    x: Axis,
    marks: Sequence[Mark],
    unit: str,
    title: str,
    zero: bool = False,
    scale: float = 1.0,
    noisy: bool = True,
) -> str:
    """A curve and, if it is ``noisy`` and long, its average; ``zero``: from 0 on."""
    average = curve.smooth() if noisy else []
    points, smooth = ([(step, scale * value) for step, value in some] for some in (curve.points(), average))
    raw = Line("", f"{style} raw" if smooth else style, points, curve.count < 25)
    lines = [raw, Line("", style, smooth)] if smooth else [raw]
    told = {"value": points} | ({"average": smooth} if smooth else {})
    values = [y for _, y in points]
    label = f"{title} from step {points[0][0]:,} to {points[-1][0]:,}: from {figure(values[0])} to {figure(values[-1])}"
    label += f", between {figure(min(values))} and {figure(max(values))}"
    return _plots(x, lines, told, marks, label, ("step", unit), zero)


def _plots(
    x: Axis,
    lines: Sequence[Line],
    told: Told,
    marks: Sequence[Mark],
    label: str,
    units: tuple[str, str],
    zero: bool = False,
) -> str:
    """A plot; where the values span far more than one factor, two of them, by factors and by differences."""
    values = [y for line in lines for _, y in line.points]
    far = not zero and min(values) > 0 and max(values) > LOG_FROM * min(values)
    axes = [axis_of(values, logarithmic=True)] if far else []
    axes.append(axis_of(values, zero=zero))
    shown = {name: _thin(points) for name, points in told.items()}
    plots = []
    for y in axes:
        kind = ("logarithmic" if y.logarithmic else "linear") if far else ""
        series = escape(json.dumps([[name, points] for name, points in shown.items()], separators=(",", ":")))
        ends = escape(json.dumps([x.low, x.high, y.low, y.high, y.logarithmic]))
        chart = draw(x, y, lines, marks, label, units)
        plots.append(
            f'<div class="plot {kind}" data-ends="{ends}" data-x="{units[0]}" data-series="{series}">{chart}</div>'
        )
    return "".join(plots)


def _key(marks: Sequence[Mark]) -> str:
    """What the lines across a chart are."""
    said = {"resume": "resumed", "skip": "steps skipped"}
    styles = dict.fromkeys(mark.style for mark in marks)
    items = "".join(f'<li class="{style}s"><i></i>{said[style]}</li>' for style in styles)
    return f'<ul class="key">{items}</ul>' if items else ""


def _figure(name: str, title: str, said: str, plots: str, legend: str = "") -> str:
    choice = ""
    if "plot logarithmic" in plots:  # chosen without a script: the plots are siblings of the inputs
        choice = (
            f'<input type="radio" name="scale-{name}" id="{name}-log" class="log" checked>'
            f'<label for="{name}-log">log</label>'
            f'<input type="radio" name="scale-{name}" id="{name}-linear" class="lin">'
            f'<label for="{name}-linear">linear</label>'
        )
    caption = f"<figcaption><h3>{escape(title)}</h3><p>{escape(said)}</p></figcaption>"
    return f'<figure class="curve" id="{name}">{caption}{choice}{plots}{legend}</figure>'


def _legend(entries: Sequence[tuple[str, str]], unit: str) -> str:
    items = "".join(f'<li><span class="swatch {style}"></span>{escape(name)}</li>' for style, name in entries)
    return f'<ul class="legend"><li class="unit">{escape(unit)}</li>{items}</ul>'


def _steps(total: int, last: int) -> Axis:
    """From 0 to the end of the run; while it is young, to a little more than it has."""
    return Axis(0, max(min(total, last * 1.25) if total else last, last, 1))


def _shade(i: int, count: int) -> int:
    """Which of ten colours, from pale to strong, the i-th of some curves has."""
    return round(9 * i / max(count - 1, 1))


def _thin(points: Sequence[tuple[float, float]]) -> list[list[float]]:
    kept = points[:: -(-len(points) // TOLD)] if points else []
    return [[round(x, 1), float(f"{y:.5g}")] for x, y in kept]


def figure(value: float) -> str:
    """A number as it stands in a text: four digits that count."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
