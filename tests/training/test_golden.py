"""Runs that earlier releases wrote: today's code restores them, trains them on and draws with them.

Every format of checkpoints has one in ``golden/``; ``tools/make_golden_run.py`` made it when the format was new.
"""

import contextlib
import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from dit_jax import build, train
from dit_jax.config import load_config, read_run
from dit_jax.files import flatten
from dit_jax.sample import Pipeline
from dit_jax.sharding import make_mesh, replicated
from dit_jax.training import manifest
from dit_jax.training.checkpoint import Checkpoints
from dit_jax.training.saved_steps import FORMAT, ITEMS, find_step
from dit_jax.training.state import abstract_state
from dit_jax.trees import named_leaves
from tests.tiny_run import tiny_config

GOLDEN = Path(__file__).parent / "golden"
FORMATS = range(1, FORMAT + 1)


def unpacked(number: int, folder: Path) -> tuple[Path, dict]:
    """The run of a format, and what is true of it."""
    name = GOLDEN / f"format_{number}"
    shutil.unpack_archive(name.with_suffix(".zip"), folder)
    return folder, json.loads(name.with_suffix(".json").read_text())


@pytest.fixture(params=FORMATS, ids="format {}".format)
def golden(request, tmp_path) -> tuple[Path, dict]:
    return unpacked(request.param, tmp_path / "run")


def sums(tree) -> dict[str, float]:
    """Of every leaf; fused maps have the same numbers in every format."""
    return {name: math.fsum(np.asarray(leaf, np.float64).ravel()) for name, leaf in named_leaves(tree).items()}


def assert_restored(run: Path, expected: dict) -> None:
    config, mesh, step = read_run(run), make_mesh(jax.devices()), expected["step"]
    side = config.data.image_size // build.make_vae(config).factor
    model, (optimizer, _) = build.make_model(config, np.float32), build.make_optimizer(config)
    with contextlib.closing(Checkpoints(run / "checkpoints", keep_latest=1, keep_every=0)) as checkpoints:
        state = checkpoints.restore(step, abstract_state(model, optimizer, side, side, mesh))
    assert sums({"params": state.params, "ema": state.ema, "opt_state": state.opt_state}) == expected["sums"]
    assert int(state.step) == step and float(state.loss_scale.scale) == expected["loss_scale"]
    assert int(state.skips.total) == expected["skipped"] > 0
    assert int(state.skips.in_a_row) == expected.get("skipped_in_a_row", 0)  # which format 1 did not count
    assert mesh.size == 2
    assert all(leaf.sharding.is_equivalent_to(replicated(mesh), leaf.ndim) for leaf in jax.tree.leaves(state))


def test_a_state_of_every_format_is_restored_value_by_value(golden):
    run, expected = golden
    report, _ = find_step(run / "checkpoints", None, "full", ITEMS)
    assert report.verifiable and report.step == expected["step"]
    assert_restored(run, expected)


def test_a_state_of_before_there_were_formats_is_restored_value_by_value(tmp_path):
    run, expected = unpacked(1, tmp_path / "run")
    step = run / "checkpoints" / str(expected["step"])
    (step / manifest.NAME).unlink()
    metadata = json.loads((step / "metadata" / "metadata").read_text())
    del metadata["format"]
    (step / "metadata" / "metadata").write_text(json.dumps(metadata))
    assert not find_step(run / "checkpoints", None, "full", ITEMS)[0].verifiable
    assert_restored(run, expected)


def test_a_run_of_every_format_is_trained_on(golden):
    run, expected = golden
    before = (run / "metrics.jsonl").read_text()
    train.run(load_config(str(run / "config.json"), {}), run)
    text = (run / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.removeprefix(before).splitlines()]
    assert text.startswith(before) and [row["skipped"] for row in rows] == [expected["skipped"]] * len(rows)
    losses = {str(row["step"]): row["loss"] for row in rows}
    assert losses == pytest.approx(expected["losses"], rel=5e-3)  # float16, on other devices


def test_a_run_of_every_format_draws(golden):
    run, expected = golden
    pipeline = Pipeline.load(run)
    assert pipeline.trained.step == expected["step"]
    found = {f"ema/{name}": total for name, total in sums(pipeline.params).items()}
    assert found.items() <= expected["sums"].items() and len(found) > 20


def test_a_config_of_every_format_has_all_keys_of_today(golden):
    """`dit_jax.config.ADDED` says what those mean that it does not have."""
    run, _ = golden
    assert flatten(read_run(run)).keys() == flatten(tiny_config()).keys()
