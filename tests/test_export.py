"""A model leaves its run as one folder that draws the same pictures, wherever it is and however it was written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image
from safetensors.numpy import load_file, save_file

from dit_jax import export, main, stored
from dit_jax.config import FORMATS, load_config
from dit_jax.errors import CheckpointError, ConfigError
from dit_jax.exchange.components import PARAMETERS
from dit_jax.sample import Pipeline
from dit_jax.sharding import make_mesh
from dit_jax.trees import count_parameters
from tests.tiny_run import train_tiny

PROMPTS = ["a large red circle", "a small blue square"]


def pictures(pipe: Pipeline) -> np.ndarray:
    return np.stack([np.asarray(image, np.int32) for image in pipe(PROMPTS, seed=3)])


def export_to(folder: Path, model: Path, *flags: str) -> Path:
    export.main([f"--model={model}", f"--output={folder}", *flags])
    return folder


@pytest.fixture(scope="module")
def pipe(tiny_run) -> Pipeline:
    return Pipeline.load(tiny_run)


@pytest.fixture(scope="module", params=FORMATS)
def exported(request, tiny_run, tmp_path_factory) -> Path:
    return export_to(tmp_path_factory.mktemp("exports") / request.param, tiny_run, f"--format={request.param}")


def test_an_export_draws_the_pictures_of_its_run(exported, pipe):
    again = Pipeline.load(exported)
    assert again.trained == pipe.trained
    jax.tree.map(np.testing.assert_array_equal, again.params, pipe.params)
    np.testing.assert_array_equal(pictures(again), pictures(pipe))
    assert again.vae.sha256 == pipe.vae.sha256 and str(exported) in again.vae.name  # the copy that lies in it


def test_an_export_can_be_moved_and_draws_in_a_process_that_knows_nothing_else(exported, pipe, tmp_path):
    moved = shutil.copytree(exported, tmp_path / "elsewhere")
    command = [sys.executable, "-m", "dit_jax.sample", f"--model={moved}", f"--prompt={PROMPTS[0]}", "--seed=3"]
    done = subprocess.run([*command, f"--output={tmp_path / 'out'}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{moved}: step 20, ema parameters" in done.stdout
    with Image.open(tmp_path / "out" / "00000.png") as image:
        assert np.abs(np.asarray(image, np.int32) - pictures(pipe)[0]).max() <= 1


def test_parameters_restore_on_any_mesh(exported, pipe):
    mesh = make_mesh(jax.devices())
    assert mesh.size == 2
    params = stored.open_stored(exported, None, None).restore(8, NamedSharding(mesh, PartitionSpec()))
    jax.tree.map(np.testing.assert_array_equal, params, pipe.params)
    assert all(len(leaf.sharding.device_set) == 2 for leaf in jax.tree.leaves(params))


def test_an_export_holds_parameters_and_encoders_and_says_what_they_are(exported, tiny_run, pipe):
    names = {path.name for path in exported.iterdir()}
    components = {"model_index.json", "sample.py", "scheduler", "tokenizer", "transformer"}
    own = {"safetensors": {"model.safetensors"}, "orbax": {"orbax"}, "diffusers": components}[exported.name]
    assert names == {"README.md", "samples.png", "config.json", "vae", "text_encoder"} | own
    config = json.loads((exported / "config.json").read_text())
    trained = config.pop("trained")
    assert config == json.loads((tiny_run / "config.json").read_text())
    assert trained["step"] == 20 and trained["parameters"] == "ema" and trained["vae"] == pipe.vae.sha256
    assert load_config(str(exported / "config.json"), {}).total_steps == 20  # a new run may begin with its config


def test_raw_parameters_of_an_earlier_step_and_an_export_of_an_export(tiny_run, tmp_path):
    raw = export_to(tmp_path / "raw", tiny_run, "--ema=raw", "--step=10")
    again = export_to(tmp_path / "again", raw, "--format=orbax")
    expected = Pipeline.load(tiny_run, "raw", 10)
    for folder in (raw, again):
        jax.tree.map(np.testing.assert_array_equal, Pipeline.load(folder).params, expected.params)
    with pytest.raises(CheckpointError, match="an export of the raw parameters of step 10; ema is only in the run"):
        Pipeline.load(raw, "ema")
    with pytest.raises(CheckpointError, match="an export of the raw parameters of step 10; 20 is only in the run"):
        Pipeline.load(raw, step=20)


@pytest.mark.parametrize("form", FORMATS)
def test_bfloat16_halves_the_size_and_rounds_every_parameter(tiny_run, tmp_path, pipe, form, capsys):
    whole, half = (
        export_to(tmp_path / dtype, tiny_run, f"--format={form}", f"--dtype={dtype}") for dtype in export.DTYPES
    )
    found = Pipeline.load(half).params
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), pipe.params)
    jax.tree.map(np.testing.assert_array_equal, found, rounded)
    if form != "orbax":
        file = {"safetensors": "model.safetensors", "diffusers": PARAMETERS}[form]
        sizes = [sum(a.nbytes for a in load_file(folder / file).values()) for folder in (whole, half)]
        assert sizes == [4 * count_parameters(pipe.params), 2 * count_parameters(pipe.params)]
    out = capsys.readouterr().out
    for path in half.iterdir():
        size = sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
        assert f"{path}  {size / 2**20:.2f} MiB\n" in out


def test_a_new_run_begins_with_an_export(tiny_run, tmp_path, capsys):
    origin = export_to(tmp_path / "origin", tiny_run)
    train_tiny(tmp_path / "run", init_from=str(origin), total_steps="1")
    assert f"init_from: {origin}, ema parameters of step 20" in capsys.readouterr().out


def test_nothing_is_trained_into_an_export(tiny_run, tmp_path, capsys, monkeypatch):
    folder = export_to(tmp_path / "export", tiny_run)
    with pytest.raises(ConfigError, match="export is an export, not a run: give another --workdir"):
        train_tiny(folder)
    monkeypatch.chdir(tmp_path)
    main.main([f"--config={folder / 'config.json'}", "--config.total_steps=1"])  # its config begins a run of its own
    assert (tmp_path / "runs" / "export" / "checkpoints" / "1").is_dir()
    assert Pipeline.load(folder).trained.step == 20 and not (folder / "checkpoints").exists()


def test_encoders_of_the_hub_are_named_unless_they_are_asked_for(tiny_run, tmp_path, pipe, monkeypatch, capsys):
    monkeypatch.setitem(pipe.config, "vae", "owner/name")
    monkeypatch.setattr(pipe.vae, "name", "owner/name")
    export.export(pipe, tmp_path / "named", "safetensors", "float32", copy_encoders=False)
    export.export(pipe, tmp_path / "copied", "safetensors", "float32", copy_encoders=True)
    assert not (tmp_path / "named" / "vae").exists() and (tmp_path / "named" / "text_encoder").is_dir()
    again = export_to(tmp_path / "again", tmp_path / "copied")
    assert (tmp_path / "copied" / "vae").is_dir() and (again / "vae").is_dir()  # what was inside stays inside
    assert stored.open_stored(tmp_path / "named", None, None).encoder_config().vae == "owner/name"


def test_what_is_damaged_or_does_not_fit_is_named(tiny_run, tmp_path):
    folder = export_to(tmp_path / "export", tiny_run)
    path = folder / "model.safetensors"
    leaves = load_file(path)
    changed = {name: leaf for name, leaf in leaves.items() if name != "pos_embed/table"}
    changed["final_layer/linear/bias"] = np.zeros(3, np.float32)
    changed["more"] = np.zeros(1, np.float32)
    save_file(changed, path)
    with pytest.raises(CheckpointError) as error:
        Pipeline.load(folder)
    for part in ("missing pos_embed/table", "extra more", "misshapen final_layer/linear/bias (3,), expected (16,)"):
        assert part in str(error.value)
    save_file(leaves, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="model.safetensors is damaged"):
        Pipeline.load(folder)

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"trained": {"step": 20}}))
    with pytest.raises(CheckpointError, match="config.json is damaged: its section 'trained'"):
        Pipeline.load(folder)
    other = config["trained"] | {"vae": "0" * 64}
    (folder / "config.json").write_text(json.dumps(config | {"trained": other}))
    with pytest.raises(CheckpointError, match="was trained with another vae"):
        Pipeline.load(folder)


def test_an_export_without_its_weights_is_named(tiny_run, tmp_path):
    folder = export_to(tmp_path / "export", tiny_run)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no parameters in"):
        Pipeline.load(folder)


def test_nothing_is_overwritten_and_nothing_half_written_is_left(tiny_run, tmp_path, pipe, capsys, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(SystemExit) as exit:
        export_to(tmp_path / "mine", tiny_run)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and "mine holds something already" in error and error.count("\n") == 1
    monkeypatch.setattr(stored, "save_file", lambda *args, **more: pytest.fail("interrupted"))
    with pytest.raises(pytest.fail.Exception):
        export.export(pipe, tmp_path / "new", "safetensors", "float32", copy_encoders=False)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
