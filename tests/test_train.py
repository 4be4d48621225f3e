"""Whole runs: resuming is exact, a seed is a run, and a workdir holds what it should."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from dit_jax import build, train
from dit_jax.config import ADDED, load_config
from dit_jax.encoders.places import ASSETS
from dit_jax.errors import CheckpointError, ConfigError
from dit_jax.sample import Pipeline
from dit_jax.trees import named_leaves
from tests.tiny_run import tiny_config, tiny_flags, train_tiny

GOLDEN = Path(__file__).parent / "encoders" / "golden"


def leaves(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Everything that a checkpoint holds, by name, as it lies on disk."""
    found = {}
    for item in ("params", "ema", "optimizer"):
        tree = ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(step) / item)
        found |= {f"{item}/{name}": np.asarray(leaf) for name, leaf in named_leaves(tree).items()}
    return found


def assert_same_parameters(a: Path, b: Path, step: int) -> None:
    ours, theirs = leaves(a, step), leaves(b, step)
    assert ours.keys() == theirs.keys() and len(ours) > 50
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def assert_same_run(a: Path, b: Path, step: int) -> None:
    assert_same_parameters(a, b, step)
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()


def run_main(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "dit_jax.main", *flags], capture_output=True, text=True, check=False)


def test_a_run_stopped_at_9_and_resumed_in_another_process_is_the_same_run(tiny_run, tmp_path):
    for change in ({"stop_at_step": "9"}, {}):
        done = run_main(*tiny_flags(tmp_path, **change))
        assert done.returncode == 0, done.stderr
    assert "resuming from step 9" in done.stdout and "done: step 20 of 20" in done.stdout
    assert_same_run(tiny_run, tmp_path, 20)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 3, 6, 9, 12, 15, 18, 20]


@pytest.mark.slow
def test_slices_of_batches_and_workers_change_nothing_of_that(tmp_path):
    """Also where the data are encoded at every step, and the run ends in the middle of an epoch."""
    changes = {"accumulate": "2", "data__encode": "every_step", "data__workers": "2", "total_steps": "8"}
    whole, parts = train_tiny(tmp_path / "whole", **changes), tmp_path / "parts"
    for stop in ("5", "0"):
        train_tiny(parts, **changes, stop_at_step=stop)
    assert_same_run(whole, parts, 8)


def test_two_runs_at_a_time_do_not_share_a_workdir(tmp_path):
    first = []

    def second(step, row):
        if step == 1 and not first:
            first.append(step)
            with pytest.raises(ConfigError, match=f"another process trains in {tmp_path}"):
                train_tiny(tmp_path, total_steps="2", sample_every="0")

    train.run(tiny_config(total_steps="2", sample_every="0"), tmp_path, second)
    assert first == [1]


def test_twice_the_same_seed_is_the_same_run_and_another_seed_is_not(tiny_run, tmp_path):
    assert_same_run(tiny_run, train_tiny(tmp_path / "same"), 20)
    other = leaves(train_tiny(tmp_path / "other", seed="1"), 20)
    mine = leaves(tiny_run, 20)
    name = "params/blocks_0/mlp/fc_in/kernel"
    assert np.abs(other[name] - mine[name]).max() > 1e-3


def test_encoding_at_every_step_is_the_same_run_as_encoding_once(tiny_run, tmp_path):
    run = train_tiny(tmp_path, data__encode="every_step")
    rows = [[json.loads(line) for line in (w / "metrics.jsonl").read_text().splitlines()] for w in (tiny_run, run)]
    for once, every in zip(*rows, strict=True):
        assert once["step"] == every["step"]
        assert once["loss"] == pytest.approx(every["loss"], rel=1e-4)


def long_captions(folder: Path) -> str:
    folder.mkdir()
    rows = []
    for i in range(8):
        Image.new("RGB", (64, 64), (30 * i, 0, 0)).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"{i} red circles " * (20 if i < 6 else 1)}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return f"folder:{folder}"


@pytest.mark.slow
def test_long_captions_are_told_once(tmp_path, capsys):
    source = long_captions(tmp_path / "pictures")
    for encode in ("once", "every_step"):  # the latter looks at the first eight samples, which are all there are
        train_tiny(tmp_path / encode, data__source=source, data__encode=encode, total_steps="2", sample_every="0")
        said = [line for line in capsys.readouterr().out.splitlines() if "may be cut" in line]
        assert len(said) == 1 and re.search(r": 6(?: of the first 8)?, the first '(\d) red circles \1 red", said[0])


@pytest.mark.slow  # of the step alone, tests/training/test_step.py says it
def test_gradient_accumulation_gives_the_same_losses(tmp_path):
    """Without dropout in the network, whose draws belong to a slice."""
    rows = []
    for accumulate in ("1", "2"):
        run = train_tiny(tmp_path / accumulate, accumulate=accumulate, model__dropout="0", total_steps="6")
        rows.append([json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()])
    np.testing.assert_allclose(*rows, rtol=1e-4)


def test_a_workdir_holds_what_it_should(tiny_run):
    names = {path.name for path in tiny_run.iterdir()}
    assert {"config.json", "checkpoints", "metrics.jsonl", "timing.jsonl", "tb", "samples", "encoded"} <= names
    assert {path.name for path in (tiny_run / "checkpoints").iterdir()} >= {"5", "10", "15", "20"}
    assert list((tiny_run / "tb").glob("events.out.tfevents.*"))
    config = json.loads((tiny_run / "config.json").read_text())
    assert config["model"]["text_width"] > 0 and len(config["latents"]["scale"]) == config["model"]["in_channels"]
    with Image.open(tiny_run / "samples" / "00000020.png") as grid:
        assert grid.size == (4 * 64, 64) and grid.info["step"] == "20" and "red circle" in grid.info["prompt"]
    for line in (tiny_run / "metrics.jsonl").read_text().splitlines():
        assert {"step", "loss", "grad_norm", "learning_rate", "skipped", "skipped_in_a_row"} == json.loads(line).keys()


def test_a_finished_run_says_so_and_changes_nothing(tiny_run, capsys):
    before = (tiny_run / "metrics.jsonl").read_bytes()
    assert train.run(tiny_config(), tiny_run) is None
    assert "nothing to do: step 20 of 20 is done" in capsys.readouterr().out
    assert (tiny_run / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_stopped_run_says_where_it_stops_and_goes_on_by_its_own_config(tmp_path, capsys):
    changes = {"total_steps": "4", "sample_every": "0"}
    run, whole = tmp_path / "run", train_tiny(tmp_path / "whole", **changes)
    train_tiny(run, **changes, stop_at_step="2")
    assert train.run(tiny_config(**changes, stop_at_step="2"), run) is None
    assert "nothing to do: step 2 of 2 is done (stop_at_step 2 of 4)" in capsys.readouterr().out
    train.run(load_config(str(run / "config.json"), {}), run)
    assert_same_run(whole, run, 4)


def test_a_workdir_of_another_config_is_refused_and_left_alone(tiny_run):
    before = (tiny_run / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=r"learning_rate: 0.02 -> 0.5"):
        train.run(tiny_config(learning_rate="0.5"), tiny_run)
    assert (tiny_run / "config.json").read_bytes() == before


@pytest.mark.slow
def test_a_run_becomes_longer_where_that_is_said(tmp_path):
    changes = {"total_steps": "2", "warmup_steps": "1", "sample_every": "0"}
    run = train_tiny(tmp_path, **changes)
    longer = changes | {"total_steps": "4"}
    with pytest.raises(ConfigError, match="a run of 2 steps, not 4: add --extend to make it longer"):
        train_tiny(run, **longer)
    with pytest.raises(ConfigError, match="learning_rate: 0.02 -> 0.5"):
        train.run(tiny_config(**longer, learning_rate="0.5"), run, extend=True)
    with pytest.raises(ConfigError, match="total_steps: 2 -> 1"):
        train.run(tiny_config(**changes | {"total_steps": "1"}), run, extend=True)
    train.run(tiny_config(**longer), run, extend=True)
    assert (run / "checkpoints" / "4").is_dir()
    assert json.loads((run / "config.json").read_text())["total_steps"] == 4
    assert train.run(tiny_config(**longer), run) is None


def test_a_run_does_not_go_on_with_other_pictures(tmp_path):
    """The config is the same, a file behind it is not."""
    pictures, run = tmp_path / "pictures", tmp_path / "run"
    pictures.mkdir()
    for k in range(8):
        Image.new("RGB", (64, 64), (30 * k, 0, 0)).save(pictures / f"{k}.png")
        (pictures / f"{k}.txt").write_text(f"a picture of {k} red")
    change = {"data__source": f"folder:{pictures}", "total_steps": "2", "sample_every": "0", "save_every": "1"}
    train_tiny(run, **change, stop_at_step="1")
    (pictures / "3.txt").write_text("a picture of something else")
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    with pytest.raises(ConfigError, match="the run was begun with another data"):
        train_tiny(run, **change)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before


def test_the_loss_falls(tmp_path):
    run = train_tiny(tmp_path, total_steps="150", batch_size="16", log_every="1", learning_rate="0.003",
                     sample_every="0", save_every="0")  # fmt: skip
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 150
    assert np.mean(losses[-20:]) < 0.9 * np.mean(losses[:20])
    assert [path.name for path in (run / "checkpoints").glob("[0-9]*")] == ["150"]  # the end is always saved


def test_the_step_runs_on_two_devices_with_the_batch_split(tmp_path, capsys):
    """Both fake devices of the tests are one mesh, as in the run that the tests above share."""
    assert jax.device_count() == 2
    train_tiny(tmp_path, stop_at_step="1", sample_every="0")
    assert "mesh {'data': 2, 'fsdp': 1, 'tensor': 1}" in capsys.readouterr().out


def test_a_run_begins_with_the_averaged_parameters_of_another(tiny_run, tmp_path, capsys):
    run = train_tiny(tmp_path, init_from=str(tiny_run), total_steps="1", learning_rate="0", ema_decay="0.5")
    out = capsys.readouterr().out
    begun, theirs = leaves(run, 1), leaves(tiny_run, 20)
    averaged = [name for name in theirs if name.startswith("ema/")]
    told = f"init_from: {tiny_run}, ema parameters of step 20: {len(averaged)} of {len(averaged)} taken over"
    assert told in out and "init_from: new" not in out
    for name in averaged:
        np.testing.assert_array_equal(begun[name.replace("ema/", "params/")], theirs[name], err_msg=name)
        np.testing.assert_array_equal(begun[name], theirs[name], err_msg=name)
    assert begun["optimizer/step"] == 1
    config = json.loads((run / "config.json").read_text())
    assert config["latents"] == json.loads((tiny_run / "config.json").read_text())["latents"]


def test_a_run_of_another_size_begins_with_what_fits_and_names_the_rest(tiny_run, tmp_path, capsys):
    change = {"model__num_layers": "2", "data__image_size": "32", "data__num_pictures": "8", "model__time_scale": "10"}
    train_tiny(tmp_path, init_from=str(tiny_run), total_steps="1", **change)
    out = capsys.readouterr().out
    assert "init_from: resampled: pos_embed/table" in out and "init_from: new: blocks_1/mlp/fc_in/kernel" in out
    assert out.count("warning: init_from was trained with") == 1
    assert "warning: init_from was trained with model.time_scale=1000.0, this run has 10.0" in out


def test_a_run_does_not_begin_with_parameters_for_other_encoders(tiny_run, tmp_path):
    vae = Path(shutil.copytree(ASSETS / "tiny_vae", tmp_path / "vae"))
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps(config | {"_name_or_path": "mine"}))
    with pytest.raises(ConfigError, match="was trained with another vae .its own: vae embedded"):
        train_tiny(tmp_path / "new", init_from=str(tiny_run), vae=str(vae))
    with pytest.raises(CheckpointError, match="no run in nowhere"):
        train_tiny(tmp_path / "newer", init_from="nowhere")


@pytest.mark.slow
def test_a_run_may_learn_the_variance_that_ddpm_draws_with(tmp_path):
    run = train_tiny(tmp_path, model__out_channels="8", total_steps="3", sample__sampler="ddpm")
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and np.isfinite(losses).all()
    kernel = leaves(run, 3)["params/final_layer/linear/kernel"]  # it began at 0
    assert (np.abs(kernel.reshape(-1, 8)).max(0) > 0).all()

    pipeline = Pipeline.load(run)
    ddpm, ancestral = (
        pipeline.draw(["a large red circle"], [0], sampler=name).astype(int) for name in ("ddpm", "euler_ancestral")
    )
    assert np.abs(ddpm - ancestral).max() > 1  # the same mean, another variance


def test_samples_of_a_run_may_be_decoded_by_another_vae(tiny_run, tmp_path, capsys):
    preview = Path(shutil.copytree(ASSETS / "tiny_vae", tmp_path / "preview"))
    (weights,) = preview.glob("*.safetensors")
    tensors = load_file(weights)
    tensors["decoder.conv_out.bias"] = tensors["decoder.conv_out.bias"] - np.float16(0.5)
    save_file(tensors, weights)
    run = train_tiny(tmp_path / "run", preview_vae=str(preview))
    assert f"start check: {preview} decodes them for the samples of the run, " in capsys.readouterr().out
    assert_same_parameters(tiny_run, run, 20)
    means = []
    for workdir in (tiny_run, run):
        with Image.open(workdir / "samples" / "00000020.png") as grid:
            means.append(np.asarray(grid, np.float32).mean())
    assert means[0] - means[1] > 30  # a quarter of the range, but for what is clipped
    with pytest.raises(
        ConfigError, match="preview_vae .*vae_tiny has VAEShape.factor=4, channels=4., but embedded has"
    ):
        train_tiny(tmp_path / "other", preview_vae=str(GOLDEN / "vae_tiny"))


def test_a_run_whose_config_lacks_newer_keys_goes_on(tmp_path):
    run = train_tiny(tmp_path, stop_at_step="2")
    config = json.loads((run / "config.json").read_text())
    for key in ADDED:
        *parents, last = key.split(".")
        section = config[parents[0]] if parents else config
        assert section.pop(last) == json.loads(json.dumps(ADDED[key]))  # the tiny run has the older meaning
    (run / "config.json").write_text(json.dumps(config))
    train_tiny(run, stop_at_step="3")
    assert (run / "checkpoints" / "3").is_dir()


# --- validation ---------------------------------------------------------------------------------------------

VALIDATED = {"validate_every": "4", "data__validation_fraction": "0.5", "total_steps": "10", "sample_every": "0"}


def rows_of(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def validation_rows(workdir: Path) -> list[dict]:
    """Those of validation, which have no loss."""
    return [row for row in rows_of(workdir) if "loss" not in row]


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    """A run that validates, and what it said."""
    workdir = tmp_path_factory.mktemp("validated")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        train_tiny(workdir, **VALIDATED)
    return workdir, said.getvalue()


def test_a_run_validates_on_what_is_set_aside(validated):
    run, said = validated
    rows = validation_rows(run)
    assert [row["step"] for row in rows] == [4, 8, 10]
    for row in rows:
        levels = [row[f"validation_x0_error/log_snr={level}"] for level in range(-5, 8)]
        assert len(row) == 15 and row["validation_x0_error"] == pytest.approx(np.mean(levels))
        assert levels == sorted(levels, reverse=True) and levels[-1] > 0
    assert [row["step"] for row in rows_of(run) if "loss" in row] == [1, 3, 6, 9, 10]
    count = len(build.make_validation_source(tiny_config(**VALIDATED)))
    assert f"data: shapes, {28 - count} records, 64 px, {count} others validate" in said
    assert f"validation: {count} records" in said
    assert f"validation step=8 x0_error={rows[1]['validation_x0_error']:.4f} (log-SNR -5: " in said


def test_a_run_that_is_resumed_has_the_rows_of_one_that_is_not(validated, tmp_path):
    """Also where it stops at a step that validates."""
    for stop in ("5", "8", "0"):
        train_tiny(tmp_path, **VALIDATED, stop_at_step=stop)
    assert_same_run(validated[0], tmp_path, 10)


@pytest.mark.slow
def test_a_step_is_scored_before_it_is_saved(validated, tmp_path, monkeypatch):
    """Whatever is on disk when a step is saved must hold what came before."""

    def killed(self, state, identity):
        raise KeyboardInterrupt

    train_tiny(tmp_path, **VALIDATED, stop_at_step="7")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train.Checkpoints, "save", killed)
        train_tiny(tmp_path, **VALIDATED, save_every="8")
    assert [row["step"] for row in validation_rows(tmp_path)] == [4, 8]


@pytest.mark.slow
def test_the_best_checkpoint_stays_when_a_run_is_resumed(tmp_path):
    """By the rows of the run, of which one is made the best."""
    changes = VALIDATED | {"total_steps": "3", "validate_every": "1", "save_every": "1", "keep_latest": "1"}
    train_tiny(tmp_path, **changes, keep_best="1", stop_at_step="1")
    (row,) = validation_rows(tmp_path)
    text = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(text.replace(str(row["validation_x0_error"]), "0.001"))
    train_tiny(tmp_path, **changes, keep_best="1")
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", "3"}


def test_validating_changes_nothing_of_the_training(validated, tmp_path):
    run = train_tiny(tmp_path, **VALIDATED | {"validate_every": "0"})
    assert_same_parameters(validated[0], run, 10)
    assert rows_of(run) == [row for row in rows_of(validated[0]) if "loss" in row]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"data__validation_fraction": "0"}, "no records are set aside to validate on: set data.validation_fraction"),
        ({"data__validation_fraction": "1e-9"}, "sets no record of data.source=shapes aside to validate on: set a"),
        ({"data__validation_records": "0"}, "data.validation_records is 0; it must be 1 or more"),
        ({"validate_every": "0", "keep_best": "1"}, "keep_best is 1, but nothing is validated: set validate_every"),
    ],
)
def test_nothing_to_validate_on_is_said_before_anything_is_written(change, says, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(says)):
        train_tiny(tmp_path / "run", **{**VALIDATED, **change})
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_may_validate_more_often_but_not_on_other_records(validated, tmp_path):
    run = Path(shutil.copytree(validated[0], tmp_path / "run"))
    assert train.run(tiny_config(**VALIDATED | {"validate_every": "3"}), run) is None
    with pytest.raises(ConfigError, match="data.validation_records: 512 -> 3"):
        train.run(tiny_config(**VALIDATED, data__validation_records="3"), run)
