"""An export for diffusers draws our pictures with torch alone, comes back bit for bit, and refuses what has no word."""

import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dit_jax import export, train
from dit_jax.diffusion import samplers
from dit_jax.drawing.pipeline import Pipeline
from dit_jax.encoders import load_vae
from dit_jax.errors import ConfigError
from dit_jax.exchange import components
from dit_jax.exchange.components import MODULE, PARAMETERS, SCRIPT
from tests.tiny_run import tiny_config

PROMPTS = ["a large red circle", "a small blue square above a large green star"]
SEED, STEPS = 3, 5
SHIFT, SCALE = (0.5, -0.25, 0.0, 1.0), (0.2, 0.15, 0.25, 0.18)  # of the latents of the TAESD
CHANGES = {
    "flow": {"sampler": "euler", "grid": "shifted", "guidance_interval": (0.3, 1.0)},
    "ddim": {"sampler": "ddim"},
    "taesd": {"sampler": "euler"},
}
TAESD = Path(__file__).parents[1] / "encoders" / "golden" / "vae_tiny"
DRAW = """
import json, runpy, sys
from pathlib import Path
import torch
for folder in sys.argv[1:]:
    folder = Path(folder)
    model = runpy.run_path(str(folder / "sample.py"))["Model"](folder, "cpu")
    prompts = json.loads((folder / "prompts.json").read_text())
    noise = torch.tensor(json.loads((folder / "noise.json").read_text()))
    for i, picture in enumerate(model.draw(prompts, noise=noise)):
        picture.save(folder / f"drawn_{i}.png")
assert not {"jax", "dit_jax"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def pipes(tiny_run) -> dict[str, Pipeline]:
    """The tiny run's model with parameters that are nowhere zero: as it predicts flow, as if it predicted noise, and as
    if it had been trained in the latents of a TAESD.
    """
    pipe = Pipeline.load(tiny_run)
    leaves, structure = jax.tree.flatten(pipe.params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    found = {}
    for name, changes in CHANGES.items():
        config = pipe.sample_config({"steps": STEPS, **changes})
        if name == "ddim":
            config.diffusion.update({"schedule": "scaled_linear", "prediction": "epsilon"})
        vae, trained = pipe.vae, pipe.trained
        if name == "taesd":
            vae = load_vae(TAESD)
            trained = dataclasses.replace(trained, vae=vae.sha256)
            config.latents.update(shift=SHIFT, scale=SCALE)
            config.data.image_size = 8 * vae.factor  # the grid that the model knows
        found[name] = Pipeline(config, vae, pipe.text_encoder, structure.unflatten(noisy), trained)
    return found


@pytest.fixture(scope="module")
def folders(pipes, tmp_path_factory, tiny_run) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    for name, pipe in pipes.items():
        export.export(pipe, root / name, "diffusers", "float32", copy_encoders=False, run=tiny_run)
    return {name: root / name for name in pipes}


def test_torch_and_diffusers_draw_our_pictures(pipes, folders):
    """One process that never sees JAX, for both: the libraries take long to import."""
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    keys = jax.vmap(jax.random.key)(jnp.arange(SEED, SEED + len(PROMPTS), dtype=jnp.uint32))
    for folder in folders.values():
        noise = np.moveaxis(np.asarray(samplers.draw_prior(keys, (8, 8, 4))), -1, 1)
        (folder / "noise.json").write_text(json.dumps(noise.tolist()))
        (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    done = subprocess.run(
        [sys.executable, "-c", DRAW, *map(str, folders.values())], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name, pipe in pipes.items():
        for i, ours in enumerate(pipe(PROMPTS, seed=SEED)):
            with Image.open(folders[name] / f"drawn_{i}.png") as image:
                theirs = np.asarray(image, np.float64)
            ours = np.asarray(ours, np.float64)
            assert ours.std() > 10  # a picture, and not one colour
            assert 10 * np.log10(255**2 / max(np.mean((ours - theirs) ** 2), 1e-9)) > 40, (name, i)
    with Image.open(folders["flow"] / "drawn_0.png") as one, Image.open(folders["ddim"] / "drawn_0.png") as other:
        assert np.abs(np.asarray(one, np.int32) - np.asarray(other, np.int32)).mean() > 5


def test_it_comes_back_bit_for_bit(pipes, folders):
    for name, folder in folders.items():
        again = Pipeline.load(folder)
        jax.tree.map(np.testing.assert_array_equal, again.params, pipes[name].params)
        assert again.config.sample.sampler == CHANGES[name]["sampler"]
        assert (again.vae.sha256, again.text_encoder.sha256) == (
            pipes[name].vae.sha256,
            pipes[name].text_encoder.sha256,
        )


def test_a_new_run_begins_with_the_folder_or_its_file_of_parameters(folders, tmp_path, capsys):
    for name, place in (("folder", folders["flow"]), ("file", folders["flow"] / PARAMETERS)):
        train.run(tiny_config(init_from=str(place), total_steps="1", sample_every="0"), tmp_path / name)
        said = capsys.readouterr().out
        assert re.search(r"init_from: .*: (\d+) of \1 taken over", said), said


def test_every_file_says_what_it_is_for(folders):
    for name, folder in folders.items():
        index = json.loads((folder / "model_index.json").read_text())
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        assert index["scheduler"] == ["diffusers", scheduler["_class_name"]]
        assert index["vae"] == ["diffusers", "AutoencoderTiny" if name == "taesd" else "AutoencoderKL"]
        config = json.loads((folder / "transformer" / "config.json").read_text())
        assert config["sampling"]["steps"] == STEPS and len(config["latents_scale"]) == 4
        card = (folder / "README.md").read_text()
        for file in (MODULE, SCRIPT):
            assert hashlib.sha256((folder / file).read_bytes()).hexdigest() in card
        assert index["scheduler"][1] in card and "samples.png" in card and (folder / "samples.png").is_file()
        assert "| `loss` |" in card and f"# {name}\n" in card and "license: # fill in" in card


def test_the_card_loads_what_it_says(folders, tmp_path):
    """The commands of the card itself, in the folder."""
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    card = (folders["ddim"] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folders["ddim"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with Image.open(folders["ddim"] / "picture.png") as image:
        assert image.size == (64, 64)


def test_what_cannot_be_said_is_refused_by_name(pipes, tmp_path, monkeypatch):
    pipe = pipes["flow"]

    def refused(words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            export.export(pipe, tmp_path / "x", "diffusers", "float32", copy_encoders=False)
        assert not (tmp_path / "x").exists()

    with monkeypatch.context() as patch:
        patch.setattr(pipe, "config", pipe.sample_config({"sampler": "heun"}))
        refused("sample.sampler=heun on schedule rectified_flow has no counterpart in diffusers; choose another with")
    with monkeypatch.context() as patch:
        patch.setitem(pipe.config.model, "mlp", "relu2")
        refused(r"model.mlp=relu2 is not computed by .*torch/dit.py, which knows silu, gelu, swiglu: add it there and")
    with monkeypatch.context() as patch:
        patch.setattr(pipe.vae, "files", {"config.json": Path("a"), "flax_model.msgpack": Path("b/flax_model.msgpack")})
        refused("vae: diffusers does not read b/flax_model.msgpack; save its weights as diffusion_pytorch_model")
    with monkeypatch.context() as patch:
        patch.setattr(components, "JoinedTextModel", type(pipe.text_encoder.network))
        refused("joins several towers")


def test_settings_can_be_chosen_for_the_export(tiny_run, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        export.main([f"--model={tiny_run}", f"--output={tmp_path / 'x'}", "--format=diffusers", "--sampler=heun"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and "--sampler: euler, dpmpp_2m" in error
    export.main([f"--model={tiny_run}", f"--output={tmp_path / 'y'}", "--format=diffusers", "--sampler=dpmpp_2m"])
    stated = json.loads((tmp_path / "y" / "scheduler" / "scheduler_config.json").read_text())
    assert stated["_class_name"] == "DPMSolverMultistepScheduler" and stated["use_flow_sigmas"] is True


def test_a_card_says_only_what_these_parameters_scored(pipes, tiny_run, tmp_path):
    run = tmp_path / "run"
    (run / "evaluation").mkdir(parents=True)
    rows = [{"step": 20, "loss": 0.5}, {"step": 25, "loss": 0.1}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"step": 20, "parameters": "ema", "sampler": "ddpm", "steps": 9}
    for name, step in (("shapes", 20), ("nearest", 10)):
        report = {"settings": settings | {"step": step}, "scores": {"one_object": {"right": 0.875}}}
        (run / "evaluation" / f"{name}.json").write_text(json.dumps(report))
    (run / "evaluation" / "damaged.json").write_text("{")
    pipe = pipes["flow"]
    export.export(pipe, tmp_path / "x", "safetensors", "float32", copy_encoders=False, run=run)
    card = (tmp_path / "x" / "README.md").read_text()
    assert "| `loss` | 0.5 at step 20 |" in card and "0.1 at" not in card
    assert "| `one_object right` | 0.875 |" in card and "--metric=shapes" in card and "--metric=nearest" not in card
    assert "samples.png" not in card and 'Pipeline.load(".")' in card
