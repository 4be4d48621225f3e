"""A copy of a run: at any moment it is a run, and copied back it goes on."""

import json
import os
import shutil

import pytest

from dit_jax.errors import ConfigError
from dit_jax.mirror import mirror
from dit_jax.training import manifest
from dit_jax.training.saved_steps import ITEMS, UNFINISHED, steps_of, verify


@pytest.fixture
def run(tiny_run, tmp_path):
    """A workdir of its own."""
    return shutil.copytree(tiny_run, tmp_path / "run")


def files(folder):
    """Of a run, all but what stays on the machine."""
    found = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.name != "LOCK"}
    return {name for name in found if name.parts[0] != "encoded"}


def steps(folder):
    return steps_of(folder / "checkpoints")


def whole(folder):
    return not any(verify(folder / "checkpoints", step, "full", ITEMS).problems for step in steps(folder))


def test_a_copy_holds_what_the_run_holds_and_copied_back_it_is_the_run(run, tmp_path):
    copy, back = tmp_path / "drive" / "run", tmp_path / "back"
    assert mirror(run, copy) == steps(run) == mirror(copy, back)
    assert files(run) == files(copy) == files(back) and whole(back)
    assert all((run / name).read_bytes() == (back / name).read_bytes() for name in files(run))
    assert (run / "encoded").is_dir() and not (copy / "encoded").exists()


def test_only_what_is_new_is_copied_and_what_the_run_does_not_keep_goes(run, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    mirror(run, copy)
    first, second, *_, last = steps(run)
    shutil.rmtree(run / "checkpoints" / str(first))
    shutil.rmtree(copy / "checkpoints" / str(last))
    (run / "checkpoints" / str(second) / manifest.NAME).write_text("saved again")
    with (run / "metrics.jsonl").open("a") as rows:
        rows.write('{"step": 21}\n')
    monkeypatch.setattr(manifest, "verify", lambda *args: manifest.Verdict((), 0, 0.0))
    copied, copy2 = set(), shutil.copy2
    monkeypatch.setattr(shutil, "copy2", lambda a, b: (copied.add(os.path.relpath(a, run)), copy2(a, b)))
    assert mirror(run, copy) == [second, last]
    assert {name for name in copied if "checkpoints" not in name} == {"metrics.jsonl", "STATUS.json"}
    assert steps(copy) == steps(run)
    assert (copy / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    assert (copy / "checkpoints" / str(second) / manifest.NAME).read_text() == "saved again"


def test_where_there_is_no_run_nothing_is_done(tmp_path):
    assert mirror(tmp_path / "none", tmp_path / "copy") == []
    assert not (tmp_path / "copy").exists()


def test_a_later_step_is_never_lost(run, tmp_path):
    copy = tmp_path / "copy"
    mirror(run, copy)
    kept, found = files(copy), steps(run)
    shutil.rmtree(run / "checkpoints" / str(found[-1]))
    with pytest.raises(ConfigError, match=rf"holds step {found[-1]} and .* has none after {found[-2]}: copy it back"):
        mirror(run, copy)
    shutil.rmtree(run / "checkpoints")  # such as a new run that has saved nothing yet
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match=rf"holds step {found[-1]} and .* has none: copy it back"):
        mirror(run, copy)
    assert files(copy) == kept and (copy / "metrics.jsonl").stat().st_size


def test_another_run_is_not_written_over_and_a_longer_one_is_the_same(run, tmp_path):
    copy, path = tmp_path / "copy", run / "config.json"
    mirror(run, copy)
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"total_steps": 40}))
    assert mirror(run, copy) == []
    path.write_text(json.dumps(config | {"seed": 7}))
    with pytest.raises(ConfigError, match=r"holds a run with another config \(seed: .* -> 7\): name another place"):
        mirror(run, copy)
    assert json.loads((copy / "config.json").read_text())["seed"] != 7


class Gone(Exception):
    """The machine is taken away."""


@pytest.mark.parametrize("function", ["os.replace", "shutil.copytree", "shutil.rmtree"])
def test_wherever_it_is_cut_off_the_copy_is_a_run_and_the_next_one_completes_it(run, tmp_path, monkeypatch, function):
    """From a copy of the first two steps to that of the last two, cut off before and inside every such call."""
    for name in ("tb", "samples"):  # few files beside the checkpoints, so that it is cut among those
        shutil.rmtree(run / name)
    start = shutil.copytree(run, tmp_path / "start")
    all_steps = steps(run)
    for folder, gone in ((start, all_steps[2:]), (run, all_steps[:-2])):
        for step in gone:
            shutil.rmtree(folder / "checkpoints" / str(step))
    (start / "STATUS.json").unlink()
    (start / "config.json").write_bytes((run / "config.json").read_bytes())
    room, name = function.split(".")
    module = {"os": os, "shutil": shutil}[room]
    real = getattr(module, name)

    def cut(at, half):
        left, inside = [at], [False]

        def called(path, *args, **more):
            if inside[0]:  # copytree calls itself
                return real(path, *args, **more)
            left[0] -= 1
            if left[0] >= 0:
                inside[0] = True
                try:
                    return real(path, *args, **more)
                finally:
                    inside[0] = False
            if half and name == "copytree":
                shutil.copy(path / manifest.NAME, (args[0].mkdir(parents=True), args[0])[1])
            if half and name == "rmtree":
                (path / manifest.NAME).unlink()
            raise Gone

        return called

    calls = 0
    while True:
        for half in (False, True):
            copy = tmp_path / f"copy_{calls}_{half}"
            shutil.copytree(start, copy)
            with monkeypatch.context() as patched:
                patched.setattr(module, name, cut(calls, half))
                try:
                    mirror(run, copy)
                except Gone:
                    ended = False
                else:
                    ended = True
            assert steps(copy) and whole(copy)
            assert ended or not (copy / "STATUS.json").exists() or steps(copy) == steps(run)
            mirror(run, copy)
            assert files(copy) == files(run) and steps(copy) == steps(run) and not list(copy.rglob(f"*{UNFINISHED}*"))
            shutil.rmtree(copy)
        calls += 1
        if ended:
            break
    assert calls > 2


def test_a_step_that_goes_while_it_is_copied_is_none_of_the_copy_which_keeps_what_it_has(run, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    *before, last = steps(run)
    kept = shutil.move(run / "checkpoints" / str(last), tmp_path / "kept")
    mirror(run, copy)
    shutil.move(kept, run / "checkpoints" / str(last))
    for step in before:
        shutil.rmtree(run / "checkpoints" / str(step))
    tree = shutil.copytree

    def copytree(a, *rest, **more):
        if a == run / "checkpoints" / str(last):
            shutil.rmtree(a / "params")
        return tree(a, *rest, **more)

    monkeypatch.setattr(shutil, "copytree", copytree)
    assert mirror(run, copy) == []
    assert steps(copy) == before and whole(copy) and not list(copy.rglob(f"*{UNFINISHED}*"))
