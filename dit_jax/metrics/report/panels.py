"""The panels of a page: each shows one kind of thing that is known of a run, or says why there is nothing to show."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from dit_jax.metrics.report import figures
from dit_jax.metrics.report.charts import Mark
from dit_jax.metrics.report.grids import Picture
from dit_jax.metrics.report.record import SPEED, TRAINING, VALIDATION, Record
from dit_jax.metrics.report.words import LETTERS, absent, count, cut, moment, score, table, whole, word

COLUMNS = 4  # of a grid of samples, if it has so many pictures
ENDS_SHOWN = 50


class Facts(NamedTuple):
    """All that a page is made of.

    Attributes:
      name: of the run.
      record: its numbers.
      pictures: grids of samples by step; in place of one that cannot be read, why.
      grids: how many there are in all.
      status: of ``STATUS.json``.
      config: values by dotted key, each with the default, or None where that is not known.
      scores: of ``evaluation/``, by metric.
      about: what a run says of itself beside its config: versions, devices, parameters, hashes.
      notes: what could not be read.
    """

    name: str
    record: Record
    pictures: list[tuple[int, Picture | str]]
    grids: int
    status: Mapping[str, Any]
    config: Mapping[str, tuple[Any, Any]]
    scores: Mapping[str, Any]
    about: Mapping[str, Any]
    notes: list[str]

    def number(self, key: str) -> int:
        """A whole number of the config; 0 where it is not known."""
        value = self.config.get(key, (0, None))[0]
        return value if type(value) is int else 0

    @property
    def step(self) -> int:
        """The last one that is known of."""
        return max(self.record.last_step, whole(self.status, "step"))

    @property
    def total(self) -> int:
        """Steps of the run; 0 where that is not known."""
        return self.number("total_steps") or whole(self.status, "total_steps")


def samples(facts: Facts) -> str:
    """The grids; with a script one at a time under a slider, else all of them."""
    if not facts.pictures:
        every = facts.config.get("sample_every", (None,))[0]
        return absent("sample_every is 0: no samples are drawn" if every == 0 else "no samples were drawn yet")
    shown = [(step, picture) for step, picture in facts.pictures if isinstance(picture, Picture)]
    figures_ = "".join(_grid(step, picture) for step, picture in shown)
    lost = "".join(absent(picture) for _, picture in facts.pictures if isinstance(picture, str))
    last = len(shown) - 1
    slider = (
        f'<div class="slider"><label for="when">step</label><input type="range" id="when" min="0" max="{last}"'
        f' value="{last}" step="1"><output id="which" for="when">{shown[-1][0]:,}</output>'
        '<button type="button" id="play" aria-label="play the samples from the first to the last">play</button></div>'
        if last > 0
        else ""
    )
    thinned = f"; {len(facts.pictures)} of {facts.grids} are kept here" if facts.grids > len(facts.pictures) else ""
    said = f"the same prompts and the same noise at every step, drawn with averaged parameters{thinned}"
    return f'<p class="said">{said}</p>{slider}<div class="grids">{figures_}</div>{lost}'


def _grid(step: int, picture: Picture) -> str:
    columns = min(len(picture.prompts), COLUMNS) or 1
    prompts = "".join(f"<li>{escape(prompt)}</li>" for prompt in picture.prompts)
    listed = f'<ol class="prompts" style="--columns:{columns}">{prompts}</ol>' if prompts else ""
    seeds = f", seeds {escape(picture.seeds)}" if picture.seeds else ""
    label = f"grid of samples at step {step:,}" + (f": {'; '.join(picture.prompts)}" if picture.prompts else "")
    return (
        f'<figure class="grid" data-step="{step}"><img src="{picture.data}" width="{picture.width}"'
        f' height="{picture.height}" alt="{escape(label[:LETTERS])}" decoding="async">'
        f"<figcaption>step {step:,}{seeds}</figcaption>{listed}</figure>"
    )


def loss(facts: Facts) -> str:
    record = facts.record
    if not record.curves["loss"].count:
        lost = f": {record.not_finite} had a loss that is no number" if record.not_finite else ""
        return absent(f"no loss was written yet{lost}")
    return figures.training_loss(record, facts.total, _marks(facts))


def validation(facts: Facts) -> str:
    record, marks = facts.record, _marks(facts)
    if not record.curves[VALIDATION].count:
        every = facts.number("validate_every")
        never = "validate_every is 0: set data.validation_fraction and validate_every to see it"
        return absent(f"the first validation comes at step {every:,}" if every else never)
    parts = [figures.validation(record, facts.total, marks)]
    if record.levels:
        parts += [figures.levels(record, facts.total, marks)]
    if record.profiles.count:
        parts += [figures.profiles(record)]
    return "".join(parts)


def speed(facts: Facts) -> str:
    first, *others = SPEED
    record = facts.record
    if not record.curves[first].count:
        return absent("no row of timing.jsonl was written yet")
    return figures.speed(record, facts.total, _marks(facts)) + _plain(facts, others)


def optimizer(facts: Facts) -> str:
    return _plain(facts, TRAINING[1:]) or absent("no row was written yet")


def _plain(facts: Facts, names: Sequence[str]) -> str:
    record, marks = facts.record, _marks(facts)
    return "".join(figures.plain(record, name, facts.total, marks) for name in names if record.curves[name].count)


def notes(facts: Facts) -> str:
    return f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in facts.notes)}</ul>"


def scores(facts: Facts) -> str:
    if not facts.scores:
        return absent("not scored yet: python -m dit_jax.evaluate --model=WORKDIR writes them, here too")
    parts = []
    for metric, found in facts.scores.items():
        values, settings = (found.get(key) if isinstance(found, dict) else None for key in ("scores", "settings"))
        if not isinstance(values, dict):
            continue
        rows = {name: row for name, row in values.items() if isinstance(row, dict)}
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        plain = {name: value for name, value in values.items() if name not in rows}
        said = ", ".join(f"{k} {cut(v)}" for k, v in settings.items()) if isinstance(settings, dict) else ""
        parts.append(f'<figure class="score"><figcaption><h3>{escape(metric)}</h3><p>{escape(said)}</p></figcaption>')
        if rows:
            cells = [[name, *(score(row.get(column, "")) for column in columns)] for name, row in rows.items()]
            parts.append(table(["", *columns], cells))
        if plain:
            parts.append(table(["", ""], [[name, score(value)] for name, value in plain.items()]))
        parts.append("</figure>")
    return "".join(parts)


def history(facts: Facts) -> str:
    record, status = facts.record, facts.status
    parts = []
    lives = [*_ends(status), status]
    restarts = whole(status, "restarts")
    if restarts:
        rows = [
            [
                count(life.get("start")),
                count(life.get("step")),
                _end(life, life is status),
                cut(life.get("reason", "")),
                moment(life.get("updated")),
            ]
            for life in lives
        ]
        unknown = restarts + 1 - len(rows)
        said = f"; {unknown} more are not on record" if unknown > 0 else ""
        parts.append(f'<p class="said">{restarts + 1} processes have worked at this run{said}.</p>')
        parts.append(table(["from step", "to step", "ended", "why", "when"], rows))
    else:
        parts.append('<p class="said">One process has worked at this run.</p>')
    if record.skipped:
        rows = [[f"{skip.after:,} to {skip.until:,}", f"{skip.steps:,}"] for skip in record.skips]
        steps = "1 step was" if record.skipped == 1 else f"{record.skipped:,} steps were"
        said = f"{steps} skipped up to the last row, as loss or gradient was not finite."
        parts.append(f'<p class="said">{said}</p>')
        parts.append(table(["between the rows of steps", "skipped"], rows))
    else:
        parts.append('<p class="said">No step was skipped.</p>')
    return "".join(parts)


def _end(life: Mapping[str, Any], latest: bool) -> str:
    """How a process ended; one that could not say so was killed."""
    state = cut(life.get("state", ""))
    return "killed" if state in ("starting", "training") and not latest else state


def config(facts: Facts) -> str:
    if not facts.config:
        return absent("there is no config.json that can be read")
    known = any(default is not None for _, default in facts.config.values())
    rows, changes = [], 0
    for key, (value, default) in facts.config.items():
        changed = default is not None and default != value
        changes += changed
        was = f'<span class="was">{escape(word(default))}</span>' if changed else ""
        style = ' class="changed"' if changed else ""
        rows.append(f'<tr{style}><th scope="row">{escape(key)}</th><td>{escape(word(value))}</td><td>{was}</td></tr>')
    said = f"{changes} of {len(rows)} keys differ from configs/default.py: they are marked, the default beside them"
    box = '<input type="checkbox" id="only" checked><label for="only">only what differs</label>'
    said = said if known else "the defaults are not installed here, so that nothing is marked"
    head = '<thead><tr><th scope="col">key</th><th scope="col">value</th><th scope="col">default</th></tr></thead>'
    listed = f'<div class="scroll" tabindex="0"><table class="keys">{head}<tbody>{"".join(rows)}</tbody></table></div>'
    return f'<p class="said">{said}</p>{box if changes else ""}{listed}'


def versions(facts: Facts) -> str:
    about = facts.about
    packages, mesh = about.get("versions"), about.get("mesh")
    rows = [[name, cut(value)] for name, value in packages.items()] if isinstance(packages, dict) else []
    rows += [[name, cut(about[name])] for name in ("python", "devices") if about.get(name)]
    rows += [["mesh", ", ".join(f"{axis} {size}" for axis, size in mesh.items())]] if isinstance(mesh, dict) else []
    hashed = ("data", "vae", "text_encoder")
    rows += [[f"{name} (sha256)", cut(about[name])[:12]] for name in hashed if about.get(name)]
    host = facts.status.get("host")
    rows += [["host", cut(host)]] if host else []
    if not rows:
        return absent("no checkpoint says them yet")
    return table(["", ""], rows)


# ------------------------------------------------------------------------------------------------------------- parts


def _marks(facts: Facts) -> list[Mark]:
    """Where the run was resumed, and where steps were skipped."""
    starts = [life.get("start") for life in (*_ends(facts.status), facts.status)]
    resumes = sorted({start for start in starts if type(start) is int and start > 0})
    marks = [Mark("resume", start, f"resumed from step {start:,}") for start in resumes]
    return marks + [
        Mark("skip", skip.until, f"{skip.steps:,} skipped between steps {skip.after:,} and {skip.until:,}")
        for skip in facts.record.skips
    ]


def _ends(status: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What ``STATUS.json`` says of earlier processes."""
    found = status.get("earlier")
    return [life for life in found if isinstance(life, dict)][-ENDS_SHOWN:] if isinstance(found, list) else []
