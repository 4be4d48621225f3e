"""The page of a run: bounded whatever the run is, whole whatever stands in its files, and drawn by a real browser."""

import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit_jax.config import load_config, to_json
from dit_jax.drawing.pictures import save_png
from dit_jax.files import flatten
from dit_jax.metrics.report import PAGE, Report
from dit_jax.metrics.report.charts import axis_of, brief
from dit_jax.metrics.report.curves import Curve, Sparse
from dit_jax.metrics.report.grids import BYTES, MOST, read_picture
from dit_jax.metrics.report.record import Record
from dit_jax.report import main
from dit_jax.workdir import METRICS, TIMING
from tests.browser import browse, find_browser
from tests.tiny_run import CONFIG

HOSTILE = "</script><b onclick=alert(1)>\"'&amp; <!-- 红色的圆"
VOID = {"meta", "link", "img", "input", "br"}
PANELS = [
    *("samples", "loss-panel", "validation-panel", "scores", "speed-panel", "optimizer", "history", "config"),
    "versions",
]


class Parsed(HTMLParser):
    """A page: every element with its attributes, all text, and whether all that is opened is closed, in order."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open and self._open.pop() == tag, f"</{tag}> closes another"

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str, style: str = "") -> list[dict[str, str]]:
        return [a for name, a in self.elements if name == tag and style in a.get("class", "").split() + [""]]


def write_rows(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_grid(workdir: Path, step: int, prompts: str = "a red circle\na blue square") -> None:
    (workdir / "samples").mkdir(exist_ok=True)
    pixels = np.random.default_rng(step).integers(0, 255, (32, 64, 3), np.uint8)
    save_png(Image.fromarray(pixels), workdir / f"samples/{step:08d}.png", {"prompt": prompts, "seed": "0 to 1"})


def write_run(workdir: Path, rows: int = 200, every: int = 10, prompts: str = "a red circle\na blue square") -> Path:
    """The files of a run that was resumed, skipped steps and was validated and scored."""
    workdir.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    metrics, timing = [], []
    for i in range(rows):
        step = every * (i + 1)
        skipped = 3 * (i >= rows // 2)
        loss = 2.0 / (1 + i / 9) + 0.03 * draw.random()
        metrics.append(
            {"step": step, "loss": loss, "grad_norm": 1 + draw.random(), "learning_rate": 1e-4, "skipped": skipped}
        )
        if i % 20 == 19:
            levels = {f"validation_x0_error/log_snr={k}": 0.5 * 0.6 ** (k + i / rows) for k in range(-5, 8)}
            metrics.append({"step": step, "validation_x0_error": 0.3 + 1 / (i + 1), **levels})
        timing.append({"step": step, "images_per_second": 900 + 60 * draw.random(), "data_wait": 0.02, "memory_gib": 9})
    write_rows(workdir / METRICS, metrics)
    write_rows(workdir / TIMING, timing)
    last = rows * every
    config = load_config(str(CONFIG), {"total_steps": str(last)})
    (workdir / "config.json").write_text(to_json(config))
    status = {"state": "done", "step": last, "total_steps": last, "reason": "", "restarts": 1, "start": last // 2}
    earlier = {"start": 0, "step": last // 2, "state": "preempted", "reason": "SIGTERM: step is saved", "updated": ""}
    times = {"productive_seconds": 4000.0, "wall_seconds": 90_000.0, "begun": "2026-01-02T03:04:05.000+00:00"}
    (workdir / "STATUS.json").write_text(json.dumps({**status, "earlier": [earlier], **times}))
    for step in (last // 2, last):
        write_grid(workdir, step, prompts)
    (workdir / "evaluation").mkdir(exist_ok=True)
    scores = {"one object": {"prompts": 200, "right": 0.985}, "two": {"prompts": 200, "right": 0.5}}
    (workdir / "evaluation/shapes.json").write_text(json.dumps({"settings": {"step": last}, "scores": scores}))
    return workdir


ABOUT = {"versions": {"jax": "0.10.2", "dit_jax": "0.1.0"}, "devices": "8 x H100", "parameters": 19_900_000}


def page_of(workdir: Path, **defaults) -> Parsed:
    assert Report(workdir, workdir, ABOUT, defaults or None).write() == ""
    return Parsed((workdir / PAGE).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("report") / "run")


# -------------------------------------------------------------------------------------------------------------- page


def test_a_page_has_all_of_a_run_and_nothing_from_elsewhere(run):
    page = page_of(run, batch_size=128, seed=0)
    assert [a["id"] for a in page.all("section")] == PANELS
    assert not page.all("p", "absent")
    for name in ("loss", "validation", "levels", "profiles", "speed", "grad_norm", "learning_rate", "data_wait"):
        assert any(a.get("id") == name for a in page.all("figure")), name
    assert len(page.all("figure", "grid")) == 2 and len(page.all("svg", "chart")) >= 8
    assert all(a["aria-label"] and a["role"] == "img" for a in page.all("svg", "chart"))
    assert all(a["alt"] and a["src"].startswith("data:image/jpeg;base64,") for a in page.all("img"))
    for _, attributes in page.elements:
        for name in ("src", "href", "action", "srcset", "data"):
            assert attributes.get(name, "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in page.text and "@import" not in page.text and "http" not in page.text.replace("http-equiv", "")
    for said in ("0.985", "preempted", "3 steps were skipped", "8 x H100", "19,900,000", "resumed", "2,000 of 2,000"):
        assert said in page.text, said
    changed = page.text[page.text.index("keys differ") - 12 : page.text.index("keys differ")]
    assert changed.split()[-3] == "1"  # of the two that have a default: quickstart has another batch_size


def test_words_of_a_run_stay_words(tmp_path):
    write_run(tmp_path / HOSTILE.replace("/", ""), rows=30, prompts=HOSTILE)
    workdir = tmp_path / HOSTILE.replace("/", "")
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["source"] = config[HOSTILE] = HOSTILE
    (workdir / "config.json").write_text(json.dumps(config))
    status = json.loads((workdir / "STATUS.json").read_text())
    (workdir / "STATUS.json").write_text(json.dumps({**status, "reason": HOSTILE, "state": HOSTILE, "host": HOSTILE}))
    (workdir / f"evaluation/{HOSTILE.replace('/', '')}.json").write_text(
        json.dumps({"settings": {HOSTILE: HOSTILE}, "scores": {HOSTILE: HOSTILE, "x": {HOSTILE: HOSTILE}}})
    )
    Report(workdir, workdir, {"versions": {HOSTILE: HOSTILE}, "devices": HOSTILE}, {"data.source": "shapes"}).write()
    page = Parsed((workdir / PAGE).read_text(encoding="utf-8"))
    assert page.text.count(HOSTILE) >= 12
    assert not page.all("b", "") or all(not a for a in page.all("b"))
    assert len(page.all("script")) == 1 and [a["id"] for a in page.all("section")] == PANELS


@pytest.mark.parametrize("files", [(), ("config.json", "STATUS.json")])
def test_a_run_that_has_just_begun_says_what_comes(run, tmp_path, files):
    for name in files:
        (tmp_path / name).write_bytes((run / name).read_bytes())
    page = page_of(tmp_path)
    assert [a["id"] for a in page.all("section")] == PANELS
    assert len(page.all("p", "absent")) >= 5 and "no loss was written yet" in page.text
    assert ("sample_every" in page.text) == bool(files)


def test_damage_leads_to_a_note_and_never_to_an_error(run, tmp_path):
    workdir = write_run(tmp_path / "run", rows=40)
    rows = (workdir / METRICS).read_text().splitlines()
    rows[3:5] = [
        "[" * 100_000,
        "{torn",
        "\0\0\0",
        '"loss"',
        '{"step": "x"}',
        '{"step": -1, "loss": 2}',
        '{"step": 20, "loss": 1.0}',
    ]
    rows.insert(20, '{"step": 165, "loss": null, "grad_norm": 1e300, "skipped": "many", "learning_rate": true}')
    (workdir / METRICS).write_bytes("\n".join(rows).encode() + b'\n\xff\xfe\n{"step": 9999, "los')
    (workdir / "samples/00000200.png").write_bytes(b"\x89PNG no more")
    (workdir / "samples/notes.txt").write_text("not ours")
    (workdir / "evaluation/shapes.json").write_text("[1]")
    for name in ("config.json", "STATUS.json"):
        (workdir / name).write_text('{"a": ')
    page = page_of(workdir)
    assert [a["id"] for a in page.all("section")] == [*PANELS, "notes"]
    notes = page.text[page.text.index("What could not be read") :]
    for said in (
        "metrics.jsonl: 8 damaged",
        "00000200.png cannot be read",
        "config.json cannot be read",
        "STATUS.json",
    ):
        assert said in notes, said
    assert len(page.all("figure", "grid")) == 1
    (workdir / "STATUS.json").write_text('{"wall_seconds": 1e400, "productive_seconds": 1e999, "earlier": [7, {}]}')
    assert "cannot be shown" in page_of(workdir).text  # in one part; the others stand
    assert [a["id"] for a in page_of(workdir).all("section")] == [*PANELS, "notes"]


def test_skipped_steps_are_marked_though_the_curve_ends_before_them(tmp_path):
    """Where the loss is no number any more there is no point, and the axis goes on all the same."""
    rows = [
        {"step": step, "loss": 2.0 - step / 9 if step < 9 else None, "skipped": int(step > 8)} for step in (3, 6, 9)
    ]
    write_rows(tmp_path / METRICS, rows)
    page = page_of(tmp_path)
    marks = [float(a["x1"].removesuffix("%")) for a in page.all("line", "mark")]
    assert marks and all(0 <= at <= 100 for at in marks)
    assert "1 step was skipped up to the last row" in page.text


def test_what_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / PAGE).mkdir()
    warning = Report(tmp_path, tmp_path, {}, None).write()
    assert warning.startswith("report.html was not written: ") and not list(tmp_path.glob("*.tmp"))


# ------------------------------------------------------------------------------------------------------------ bounds


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 1000, 4097])
def test_a_thinned_curve_keeps_least_largest_ends_and_mean(count):
    draw = random.Random(count)
    values = [draw.gauss(0, 1) for _ in range(count)]
    spike = draw.randrange(count)
    values[spike] = 1e6
    curve = Curve(64)
    assert all(curve.add(i, value) for i, value in enumerate(values))
    points = curve.points()
    assert len(points) <= 2 * 64 + 2 and points == sorted(points)
    assert (spike, 1e6) in points and points[0] == (0, values[0]) and points[-1] == (count - 1, values[-1])
    least = min(values)
    assert (values.index(least), least) in points and curve.least() == (values.index(least), least)
    sizes = [bucket.size for bucket in curve._buckets]
    assert sum(sizes) == count and len(set(sizes[:-1])) <= 1  # the mean of means weighs them alike, but for the last
    np.testing.assert_allclose(sum(b.total for b in curve._buckets), sum(values), rtol=1e-9)
    assert not curve.add(count - 1, 0.0) and curve.count == count


@pytest.mark.parametrize("count", [1, 5, 6, 7, 100, 1025])
def test_few_of_many_are_spread_evenly(count):
    sparse = Sparse(6)
    for i in range(count):
        sparse.add(i)
    found = sparse.items()
    assert found[0] == 0 and found[-1] == count - 1 and len(found) <= 7 and len(found) >= min(count, 4)
    gaps = set(np.diff(found[:-1]))
    assert len(gaps) <= 1


def test_rows_are_read_once_and_again_only_where_the_file_was_cut(run, tmp_path, monkeypatch):
    lines = (run / METRICS).read_text().splitlines(keepends=True)
    taken = []
    take = Record._take
    monkeypatch.setattr(Record, "_take", lambda *args: taken.append(1) or take(*args))
    path, record = tmp_path / METRICS, Record(tmp_path)
    for end in range(10, len(lines) + 1, 10):
        path.write_text("".join(lines[:end]) + lines[-1][:9])  # and a line that is being written
        record.read()
    whole = len(lines) // 10 * 10
    assert len(taken) == whole and not record.damaged[METRICS]
    path.write_text("".join(lines[:whole]))
    record.read()
    found = record.curves["loss"].points()
    path.write_text("".join(lines[:50]))  # as a run that is resumed cuts it
    record.read()
    assert len(taken) == whole + 50
    path.write_text("".join(lines[:whole]))
    record.read()
    assert record.curves["loss"].points() == found and len(taken) == 2 * whole


def test_a_long_run_has_a_page_of_bounded_size(tmp_path):
    """A row of every 100th of a million steps, and 60 grids."""
    workdir = write_run(tmp_path / "long", rows=10_000, every=100)
    for step in range(1, 59):
        write_grid(workdir, 1000 * step)
    page = page_of(workdir)
    assert MOST / 2 <= len(page.all("figure", "grid")) <= MOST + 1 and "of 60 are kept here" in page.text
    text = (workdir / PAGE).read_text(encoding="utf-8")
    assert len(re.sub(r"base64,[^\"]*", "", text)) < 500_000  # all curves are thinned


def test_a_picture_is_made_small_until_it_fits(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (1500, 2000, 3), np.uint8)
    save_png(Image.fromarray(noise), tmp_path / "x.png", {"prompt": "noise", "seed": "7"})
    picture = read_picture(tmp_path / "x.png")
    assert len(picture.data) <= BYTES * 4 / 3 + 40 and picture.width <= 1024 and picture.height <= 768
    assert (picture.prompts, picture.seeds) == (["noise"], "7")
    assert abs(picture.width / picture.height - 4 / 3) < 0.01


@pytest.mark.parametrize(
    ("low", "high", "logarithmic"),
    [(0, 1, 0), (-3, 8, 0), (0.499, 0.5, 0), (5, 5, 0), (0, 0, 0), (0, 1e6, 0), (1e-30, 1e30, 1), (0.02, 2, 1)]
    + [(0.9, 1.1, 1), (7, 7, 1), (1e-5, 3, 1), (-1e30, 1e30, 0), (3e-9, 4e-9, 0)],
)
def test_every_axis_has_a_few_round_ticks_inside(low, high, logarithmic):
    axis = axis_of([low, high], bool(logarithmic))
    ticks = axis.ticks(5)
    assert 2 <= len(ticks) <= 7 and all(-1e-9 <= axis.place(tick) <= 1 + 1e-9 for tick in ticks)
    assert len({brief(tick) for tick in ticks}) == len(ticks) and all(len(brief(tick)) <= 8 for tick in ticks)
    assert 0 <= axis.place(low) <= axis.place(high) <= 1


# --------------------------------------------------------------------------------------------------------- real runs


def test_a_real_run_has_its_page_and_it_can_be_made_again(tiny_run, tmp_path, capsys):
    written = Parsed((tiny_run / PAGE).read_text(encoding="utf-8"))
    assert [a["id"] for a in written.all("section")] == PANELS and len(written.all("figure", "grid")) == 2
    for name in ("loss", "speed", "grad_norm", "learning_rate", "memory_gib"):
        assert any(a.get("id") == name for a in written.all("figure")), name
    default = flatten(load_config(str(CONFIG.parent / "default.py"), {}))
    assert f"of {len(default)} keys differ" in written.text and "20 of 20" in written.text
    for name in (METRICS, TIMING, "config.json", "STATUS.json"):
        (tmp_path / name).write_bytes((tiny_run / name).read_bytes())
    main([f"--workdir={tmp_path}"])
    assert str(tmp_path / PAGE) in capsys.readouterr().out
    assert any(a.get("id") == "loss" for a in Parsed((tmp_path / PAGE).read_text()).all("figure"))


def test_where_there_is_no_run_no_page_is_made(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main([f"--workdir={tmp_path}"])
    assert end.value.code == 5 and "no run in" in capsys.readouterr().err and not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def browser():
    found = find_browser()
    if found is None:
        pytest.skip("there is no chromium here")
    with browse(found) as page:
        yield page


@pytest.fixture(scope="module")
def pages(run, tmp_path_factory):
    """Of a full run, one that has just begun and one whose words are hostile."""
    folder = tmp_path_factory.mktemp("pages")
    (folder / "empty").mkdir()
    write_run(folder / "hostile", rows=30, prompts=HOSTILE)
    (folder / "hostile/STATUS.json").write_text(json.dumps({"state": HOSTILE, "reason": "w" * 3000}))
    found = {"full": run, "empty": folder / "empty", "hostile": folder / "hostile"}
    for workdir in found.values():
        assert Report(workdir, workdir, ABOUT, {"batch_size": 128}).write() == ""
    return {name: workdir / PAGE for name, workdir in found.items()}


BLANK = """
[...document.querySelectorAll("section, figure.curve, figure.grid.shown")].filter(one => {
  const box = one.getBoundingClientRect();
  const seen = [...one.querySelectorAll("p, td, path, img")].some(inner => inner.getClientRects().length);
  return box.height < 40 || !seen || !one.innerText.trim();
}).map(one => one.id)
"""
DRAWN = """
[...document.querySelectorAll("path.line")].filter(path => path.getClientRects().length).every(path => {
  const at = path.getBoundingClientRect(), plot = path.closest(".plot").getBoundingClientRect();
  const several = path.getAttribute("d").includes("L");  // one point is a dot
  return at.width + at.height > 0 === several && at.left >= plot.left - 2 && at.right <= plot.right + 2
    && at.top >= plot.top - 2 && at.bottom <= plot.bottom + 2;
})
"""
CONTRAST = """
(() => {
  const linear = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const luminance = colour => colour.match(/[\\d.]+/g).slice(0, 3)
    .reduce((sum, v, i) => sum + linear(v / 255) * [.2126, .7152, .0722][i], 0);
  const paper = one => getComputedStyle(one).backgroundColor;
  const low = [];
  for (const one of document.querySelectorAll("h1, h2, h3, p, td, th, dt, b, span, label, text, figcaption, li")) {
    if (!one.textContent.trim() || !one.getClientRects().length) continue;
    let behind = one;
    while (/, 0\\)|transparent/.test(paper(behind))) behind = behind.parentElement;
    const style = getComputedStyle(one);
    const both = [one.tagName === "text" ? style.fill : style.color, paper(behind)].map(luminance);
    const [dark, light] = both.sort((x, y) => x - y);
    if ((light + .05) / (dark + .05) < 4.5) low.push(one.tagName + " " + one.textContent.slice(0, 30));
  }
  return low;
})()
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1440])
@pytest.mark.parametrize("name", ["full", "empty", "hostile"])
def test_a_browser_shows_it(browser, pages, name, width, dark):
    browser.open(pages[name], width, dark)
    assert not browser.complaints
    assert all(address.startswith(("file:", "data:")) for address in browser.requests)
    wide = browser.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth]")
    assert max(wide[:2]) <= wide[2] == width
    assert browser.evaluate(BLANK) == [] and browser.evaluate(DRAWN)
    assert browser.evaluate("document.querySelectorAll('section').length") == len(PANELS)
    assert browser.evaluate(CONTRAST) == []
    paper = browser.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert max(paper) < 60 if dark else min(paper) > 200


def test_the_slider_the_scale_and_the_pointer_do_what_they_say(browser, pages):
    def shown(selector, attribute):
        every = f"[...document.querySelectorAll('{selector}')]"
        return browser.evaluate(f"{every}.filter(one => one.getClientRects().length).map(one => one.{attribute})")

    browser.open(pages["full"], 1440, False)
    assert shown("figure.grid", "dataset.step") == ["2000"]
    browser.evaluate("{const w = document.getElementById('when'); w.value = 0; w.dispatchEvent(new Event('input'))}")
    assert shown("figure.grid", "dataset.step") == ["1000"]
    assert browser.evaluate("document.getElementById('which').value") == "1,000"
    assert shown("#loss .plot", "className") == ["plot logarithmic"]
    browser.evaluate("document.querySelector('label[for=loss-linear]').click()")
    assert shown("#loss .plot", "className") == ["plot linear"]
    browser.evaluate("document.querySelector('#loss .linear').focus()")
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowLeft")
    said = browser.evaluate("document.querySelector('#loss .linear .readout').innerText")
    assert re.fullmatch(r"step 1,9\d\d\nvalue 0\.\d+\naverage 0\.\d+", said), said
    assert not browser.complaints


def test_it_can_be_read_without_scripts(browser, pages):
    browser.open(pages["full"], 360, False, script=False)
    root = browser.call("DOM.getDocument", depth=1)["root"]["nodeId"]
    for selector in ("figure.grid", "#loss path.line", "#config tr.changed"):
        found = browser.call("DOM.querySelectorAll", nodeId=root, selector=selector)["nodeIds"]
        boxes = [browser.call("DOM.getBoxModel", nodeId=node)["model"] for node in found[:1]]
        assert found and boxes[0]["width"] > 0, selector
