"""The page of a run: its head, the figures that one looks for first, and its panels in the frame of the template."""

from collections.abc import Callable
from html import escape
from importlib.resources import files
from string import Template

from dit_jax.metrics.report import panels
from dit_jax.metrics.report.figures import figure
from dit_jax.metrics.report.grids import BYTES, EDGE, MOST
from dit_jax.metrics.report.panels import Facts
from dit_jax.metrics.report.record import VALIDATION
from dit_jax.metrics.report.words import absent, cut, duration, moment, short, whole


def render(facts: Facts) -> str:
    """The page as HTML."""
    parts = [
        _panel("samples", "Samples", panels.samples, facts),
        _panel("loss-panel", "Loss", panels.loss, facts, "curves"),
        _panel("validation-panel", "Validation", panels.validation, facts, "curves"),
        _panel("scores", "Scores", panels.scores, facts),
        _panel("speed-panel", "Speed", panels.speed, facts, "curves"),
        _panel("optimizer", "Optimisation", panels.optimizer, facts, "curves"),
        _panel("history", "Interruptions and skipped steps", panels.history, facts),
        _panel("config", "Config", panels.config, facts),
        _panel("versions", "Versions and hardware", panels.versions, facts),
    ]
    if facts.notes:
        parts.append(_panel("notes", "What could not be read", panels.notes, facts))
    template = Template((files("dit_jax") / "assets" / "report.html").read_text(encoding="utf-8"))
    bound = f"{MOST + 1} grids of at most {EDGE} px and {BYTES // 1024} KiB"
    return template.substitute(
        title=escape(facts.name),
        head=_shown(_head, facts),
        tiles=_shown(_tiles, facts),
        panels="\n".join(parts),
        bound=bound,
    )


def _panel(name: str, title: str, content: Callable[[Facts], str], facts: Facts, kind: str = "") -> str:
    return f'<section class="panel {kind}" id="{name}"><h2>{escape(title)}</h2>\n{_shown(content, facts)}</section>'


def _shown(content: Callable[[Facts], str], facts: Facts) -> str:
    """A part of the page; where what the run wrote cannot be shown, it says so, and the other parts stand."""
    try:
        return content(facts)
    except Exception as error:  # of whatever stands in files that somebody changed
        return absent(f"cannot be shown: {cut(error) or type(error).__name__}")


def _head(facts: Facts) -> str:
    status, step, total = facts.status, facts.step, facts.total
    state = str(status.get("state") or "no STATUS.json")[:40]
    share = min(100 * step / total, 100) if total else 0
    of = f" of {total:,}" if total else ""
    lines = [f'<p class="mark">dit_jax</p><h1>{escape(facts.name)}</h1>']
    lines.append(f'<p class="state"><span class="badge {escape(state.split()[0])}">{escape(state)}</span>')
    lines.append(f'<span class="steps">step {step:,}{of}</span></p>')
    lines.append(
        f'<div class="progress" role="progressbar" aria-label="steps done" aria-valuemin="0" aria-valuemax="100"'
        f' aria-valuenow="{share:.0f}"><span style="width:{share:.2f}%"></span></div>'
    )
    if reason := status.get("reason"):
        lines.append(f'<p class="reason">{escape(cut(reason))}</p>')
    times = [(word, moment(status.get(key))) for key, word in (("begun", "begun"), ("updated", "as of"))]
    lines.append(f'<p class="times">{" · ".join(f"{word} {time}" for word, time in times if time)}</p>')
    return "\n".join(lines)


def _tiles(facts: Facts) -> str:
    """The figures that one looks for first."""
    record, status, tiles = facts.record, facts.status, []
    loss = record.curves["loss"]
    if loss.last:
        smooth = loss.smooth()
        value, said = (smooth[-1][1], "averaged") if smooth else (loss.last[1], f"at step {loss.last[0]:,}")
        tiles.append(("training loss", figure(value), said))
    error = record.curves[VALIDATION]
    if error.last and (least := error.least()):
        tiles.append(("validation error", figure(error.last[1]), f"least {figure(least[1])} at step {least[0]:,}"))
    rate = record.curves["images_per_second"]
    if rate.last:
        means = sorted(mean for _, mean in rate.means())
        tiles.append(("images/s", figure(rate.last[1]), f"median {figure(means[len(means) // 2])}"))
    if facts.step and (batch := facts.number("batch_size")):
        tiles.append(("images seen", short(facts.step * batch), f"{batch:,} a step"))
    spent, wall = (status.get(key) for key in ("productive_seconds", "wall_seconds"))
    if isinstance(spent, int | float) and spent > 0:
        since = f"of {duration(wall)} since it began" if isinstance(wall, int | float) else "that the run has kept"
        tiles.append(("time in steps", duration(spent), since))
    if isinstance(parameters := facts.about.get("parameters"), int):
        tiles.append(("parameters", short(parameters), f"{parameters:,}"))
    if record.skipped or whole(status, "restarts"):
        restarts = whole(status, "restarts")
        tiles.append(("skipped steps", f"{record.skipped:,}", f"{restarts:,} resume{'s' * (restarts != 1)}"))
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd><b>{escape(value)}</b><span>{escape(said)}</span></dd></div>"
        for name, value, said in tiles
    )
    return f'<dl class="tiles">{items}</dl>' if items else absent("no row was written yet: the first is that of step 1")
