"""Rows of a run: cut on resume, torn lines forgotten."""

import json
import re
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from dit_jax.data.cache.parts import Unit
from dit_jax.training.progress import Beginning, Counter, EncodingCounter, Progress, duration
from dit_jax.training.writer import Writer, truncate_rows

GOOD = {"loss": 1.0, "grad_norm": 2.0, "learning_rate": 1e-4, "skipped": 0, "skipped_in_a_row": 0}


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_rows_past_the_restored_step_and_torn_lines_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 5, "loss": 2}\n{"step": 9, "loss": 1}\n{"step": 1')
    truncate_rows(path, 5)
    assert [row["step"] for row in rows(path)] == [1, 5]
    truncate_rows(tmp_path / "absent.jsonl", 5)
    assert not (tmp_path / "absent.jsonl").exists()


def test_a_writer_goes_on_where_the_run_was_restored(tmp_path):
    for start, values in ((0, {1: 3.0, 2: 2.0, 3: 1.0}), (2, {3: 1.0, 4: 0.5})):
        writer = Writer(tmp_path, start, "", {"seed": 0}, None)
        for step, loss in values.items():
            writer.metrics(step, {"loss": loss})
        writer.close()
    assert rows(tmp_path / "metrics.jsonl") == [
        {"step": step, "loss": loss} for step, loss in ((1, 3.0), (2, 2.0), (3, 1.0), (4, 0.5))
    ]


def test_who_watches_sees_rows_and_pictures_as_they_are_written(tmp_path):
    seen = []
    writer = Writer(tmp_path, 0, "", {"seed": 0}, lambda step, found: seen.append((step, found)))
    picture = np.zeros((4, 4, 3), np.uint8)
    writer.metrics(1, {"loss": 2.0})
    writer.timing(1, {"seconds": 3.0})
    writer.image(2, "samples", picture)
    assert seen == [(1, {"loss": 2.0}), (2, picture)]
    writer.close()


def test_a_new_run_is_a_new_run_at_weights_and_biases_and_a_resumed_one_goes_on(tmp_path, monkeypatch):
    ids = []
    stand_in = SimpleNamespace(init=lambda **flags: ids.append(flags["id"]) or SimpleNamespace(finish=lambda: None))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for step in (0, 5, 0):  # a run, the same resumed, and another in the same folder, begun anew
        Writer(tmp_path, step, "project", {"seed": 0}, None).close()
    assert ids[0] == ids[1] != ids[2]


def test_progress_writes_step_1_the_multiples_and_the_last(tmp_path, capsys):
    writer = Writer(tmp_path, 0, "", {"seed": 0}, None)
    progress = Progress(writer, log_every=4, start=0, total_steps=10, batch_size=2, flops=100, peak=1e6)
    for step in range(1, 11):
        with progress.waiting():
            pass
        progress.step(step, {**GOOD, "loss": 1.0 / step})
        written = [row["step"] for row in rows(tmp_path / "metrics.jsonl")]
        assert step not in written  # one step late, so that the device never waits for the host
    progress.close()
    writer.close()
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 4, 8, 10]
    timing = rows(tmp_path / "timing.jsonl")
    assert all({"images_per_second", "data_wait", "memory_gib", "mfu"} <= row.keys() for row in timing)
    assert timing[0]["mfu"] == pytest.approx(timing[0]["images_per_second"] * 100 / 1e6)
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("step=4/10 loss=0.2500 gnorm=2.00 lr=1.0e-04 img/s=") and "mfu=" in line and "eta=" in line


def test_the_first_step_says_once_how_long_it_took_and_where_the_time_went(tmp_path, capsys):
    beginning = Beginning(time.monotonic() - 5)
    beginning.done("imports")
    beginning.done("compile")
    writer = Writer(tmp_path, 0, "", {}, None)
    progress = Progress(writer, 1, 0, total_steps=2, batch_size=1, flops=1, peak=None, beginning=beginning)
    with progress.aside():
        time.sleep(0.2)
    for step in (1, 2):
        progress.step(step, {**GOOD, "loss": 1.0})
    progress.close()
    writer.close()
    (said,) = re.findall("^first step after .*$", capsys.readouterr().out, re.MULTILINE)
    whole, *parts = map(float, re.findall(r"\d+\.\d", said))
    assert re.sub(r" [\d.]+", "", said.partition(": ")[2]) == "imports, compile, samples and validation, step"
    assert sum(parts) == pytest.approx(whole, abs=0.26) and parts[0] >= 5 and parts[2] >= 0.2


def test_a_bad_step_is_said_and_has_its_row_where_rows_are_written(tmp_path, capsys):
    writer = Writer(tmp_path, 0, "", {}, None)
    progress = Progress(writer, log_every=3, start=0, total_steps=9, batch_size=2, flops=1, peak=None)
    bad = [({"loss": 1.0, "grad_norm": float("inf")}, 1), ({"loss": float("nan"), "grad_norm": 1.0}, 2), (GOOD, 0)]
    for step, (metrics, in_a_row) in enumerate(bad, start=2):
        progress.step(step, {**GOOD, **metrics, "skipped": min(step - 1, 2), "skipped_in_a_row": in_a_row})
    progress.close()
    writer.close()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert said == [
        "warning: step 2 is skipped: the gradient's norm is inf; 1 in a row",
        "warning: step 3 is skipped: the loss is nan; 2 in a row",
    ]
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert (row["step"], row["loss"], row["skipped"], row["skipped_in_a_row"]) == (3, None, 2, 2)
    assert progress.skipped_in_a_row == 0


def test_a_slow_run_does_not_say_that_it_stands_still(tmp_path, capsys, monkeypatch):
    clock = SimpleNamespace(monotonic=iter([0.0, 10.0, 10.0, 11.0, 11.0]).__next__)
    monkeypatch.setattr("dit_jax.training.progress.time", clock)
    progress = Progress(Writer(tmp_path, 0, "", {}, None), 1, 0, total_steps=2, batch_size=4, flops=1, peak=None)
    for step in (1, 2):
        progress.step(step, GOOD)
        progress.flush()
    lines = capsys.readouterr().out.splitlines()
    assert " img/s=0.4 " in lines[0] and " img/s=4.0 " in lines[1]


def test_durations_are_readable():
    assert [duration(s) for s in (7, 245, 11520)] == ["7s", "4m05s", "3h12m"]


def test_a_long_piece_of_work_says_how_far_it_is(capsys):
    for every in (0.0, 60.0):
        counter = Counter("encoded", "pictures", 10, every)
        for count in (4, 4, 2):
            counter.add(count)
        counter.close()
        lines = capsys.readouterr().out.splitlines()
        said = [f"encoded {done} of 10 pictures" for done in (4, 8)]
        assert [line.rpartition(", ")[0] for line in lines] == (said if every == 0.0 else [])


def test_pictures_and_captions_are_counted_apart(capsys):
    units = [Unit("pictures", 0, 2, 0, 0, 6), Unit("pictures", 1, 2, 0, 6, 9), Unit("texts", 0, 1, 0, 0, 4)]
    counter = EncodingCounter(units, every=0.0)
    for unit, count in ((units[0], 6), (units[2], 2)):
        counter.told(unit, count)
    counter.close()
    lines = [line.rpartition(", ")[0] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["encoded 6 of 9 pictures", "encoded 2 of 4 captions"]
