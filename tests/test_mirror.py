"""A copy of a run: it is whole at any moment, and copied back it goes on."""

import os
import shutil

import pytest

from dit_jax import mirror as module
from dit_jax.errors import ConfigError
from dit_jax.mirror import mirror
from dit_jax.training.saved_steps import ITEMS, UNFINISHED, steps_of, verify


@pytest.fixture
def run(tiny_run, tmp_path):
    """A workdir of its own."""
    return shutil.copytree(tiny_run, tmp_path / "run", copy_function=os.link)


def files(folder):
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.name != "LOCK"}


def test_a_copy_holds_what_the_run_holds_and_copied_back_it_is_the_run(run, tmp_path):
    copy, back = tmp_path / "drive" / "run", tmp_path / "back"
    assert mirror(run, copy) == steps_of(run / "checkpoints") == mirror(copy, back)
    assert files(run) == files(copy) == files(back)
    assert all((run / name).read_bytes() == (back / name).read_bytes() for name in files(run))
    assert not any(
        verify(back / "checkpoints", step, "full", ITEMS).problems for step in steps_of(back / "checkpoints")
    )


def test_only_what_is_new_is_copied_and_what_the_run_does_not_keep_goes(run, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    mirror(run, copy)
    first, *_, last = steps_of(run / "checkpoints")
    shutil.rmtree(run / "checkpoints" / str(first))
    shutil.rmtree(copy / "checkpoints" / str(last))
    with (run / "metrics.jsonl").open("a") as rows:
        rows.write('{"step": 21}\n')
    copied = []
    monkeypatch.setattr(module.shutil, "copy2", lambda a, b: (copied.append(a.name), shutil.copyfile(a, b)))
    assert mirror(run, copy) == [last]
    assert set(copied) == {"metrics.jsonl", "STATUS.json"}
    assert steps_of(copy / "checkpoints") == steps_of(run / "checkpoints")
    assert (copy / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()


def test_where_there_is_no_run_nothing_is_done(tmp_path):
    assert mirror(tmp_path / "none", tmp_path / "copy") == []
    assert not (tmp_path / "copy").exists()


def test_a_later_step_is_never_lost(run, tmp_path):
    copy = tmp_path / "copy"
    mirror(run, copy)
    steps = steps_of(run / "checkpoints")
    shutil.rmtree(run / "checkpoints" / str(steps[-1]))
    with pytest.raises(
        ConfigError, match=rf"has step {steps[-1]} of a run, and .* only step {steps[-2]}: copy it back"
    ):
        mirror(run, copy)
    assert steps_of(copy / "checkpoints") == steps


@pytest.mark.parametrize("at", range(6))
def test_a_copy_that_is_cut_off_anywhere_is_a_run_and_the_next_one_completes_it(run, tmp_path, monkeypatch, at):
    """The machine goes away at the n-th time that something gets its name."""
    copy, left, replace = tmp_path / "copy", [at], os.replace

    def name_it(a, b):
        left[0] -= 1
        if left[0] < 0:
            raise OSError("gone")
        replace(a, b)

    names = sorted(name for name in os.listdir(run) if (run / name).is_file())
    with monkeypatch.context() as patched:
        patched.setattr(module.os, "replace", name_it)
        # as many files as are small, so that the cut meets checkpoints too
        for name in names[1:]:
            if name not in ("STATUS.json", "config.json", "metrics.jsonl"):
                (run / name).unlink()
        shutil.rmtree(run / "tb")
        shutil.rmtree(run / "samples")
        with pytest.raises(OSError, match="gone"):
            mirror(run, copy)
    found = steps_of(copy / "checkpoints")
    assert not any(verify(copy / "checkpoints", step, "full", ITEMS).problems for step in found)
    assert (copy / "metrics.jsonl").exists() or not found
    assert not (copy / "STATUS.json").exists()
    mirror(run, copy)
    assert files(copy) == files(run) and not list(copy.rglob(f"*{UNFINISHED}*"))


def test_a_step_that_goes_while_it_is_copied_is_none_of_the_copy(run, tmp_path, monkeypatch):
    copy, step = tmp_path / "copy", steps_of(run / "checkpoints")[0]
    tree = shutil.copytree

    def copytree(a, *rest, **more):
        if a == run / "checkpoints" / str(step):
            shutil.rmtree(a / "params")
        return tree(a, *rest, **more)

    monkeypatch.setattr(module.shutil, "copytree", copytree)
    assert step not in mirror(run, copy)
    assert steps_of(copy / "checkpoints") == [s for s in steps_of(run / "checkpoints") if s != step]
    assert not list(copy.rglob(f"*{UNFINISHED}*"))
