"""The whole quickstart with the real programs, shortened: four steps of a tiny model."""

import json
import re

LAST_LINE = re.compile(r"shapes: one_object=\d\.\d\d two_objects=\d\.\d\d new_combinations=\d\.\d\d")


def test_it_trains_draws_and_scores(short_run):
    done, workdir = short_run.first, short_run.workdir
    assert done.returncode == 0, done.stderr
    assert LAST_LINE.fullmatch(done.stdout.splitlines()[-1])
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 4]
    assert len(list((workdir / "pictures").glob("0*.png"))) == 16
    for grid in ["pictures/grid.png", "evaluation/shapes.png"]:
        assert f"{workdir}/{grid}" in done.stdout and (workdir / grid).is_file()


def test_run_again_it_only_draws_and_scores_the_same(short_run):
    written = ["metrics.jsonl", "config.json", "pictures/00015.png"]
    before = [(short_run.workdir / name).read_bytes() for name in written]
    again = short_run.script()
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1] == short_run.first.stdout.splitlines()[-1]
    assert [(short_run.workdir / name).read_bytes() for name in written] == before
