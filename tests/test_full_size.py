"""The small model on the CPU: beside encoders as large as the published ones, and learning beside the embedded ones.

The encoders of the first part have the shapes, names and files of openai/clip-vit-large-patch14 and of
stabilityai/sd-vae-ft-mse, but random weights: what is drawn is noise, and every step on the way to it is real.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image
from safetensors.numpy import save_file

from dit_jax.encoders import describe_vae, networks, weights
from dit_jax.stored import open_stored
from dit_jax.trees import named_leaves

ROOT = Path(__file__).parents[1]

SD_VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.4.2",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 256,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TEXT_TOWER = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
VISION_TOWER = {  # nothing reads it, so it may be small
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "image_size": 224,
    "patch_size": 14,
}
CLIP_L = {
    "architectures": ["CLIPModel"],
    "logit_scale_init_value": 2.6592,
    "model_type": "clip",
    "projection_dim": 768,
    "text_config": {
        **TEXT_TOWER,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "pad_token_id": 1,
        "projection_dim": 768,
        "vocab_size": 49408,
    },
    "text_config_dict": {**TEXT_TOWER, "projection_dim": 768},
    "torch_dtype": "float32",
    "vision_config": {**VISION_TOWER, "hidden_act": "quick_gelu", "model_type": "clip_vision_model"},
    "vision_config_dict": {**VISION_TOWER, "projection_dim": 768},
}
# As files from before diffusers 0.17 spell the VAE's attention.
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

IMAGE_SIZE = 256  # of configs/small.py
PICTURES = 16  # the encoders take six seconds for each, on two cores


def random_tensors(network: Any, prefix: str, *arguments: Any) -> dict[str, np.ndarray]:
    """A network's parameters, as a training would begin with them, in float16 under published names."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), *arguments)["params"]
    random = np.random.default_rng(0)
    leaves = {}
    for path, leaf in traverse_util.flatten_dict(shapes).items():
        if path[-1] in ("bias", "scale"):
            leaves[path] = np.full(leaf.shape, path[-1] == "scale", np.float16)
        else:
            spread = np.prod(leaf.shape[:-1]) ** -0.5 if path[-1] == "kernel" else 0.02
            leaves[path] = (spread * random.standard_normal(leaf.shape, np.float32)).astype(np.float16)
    return weights.to_published(traverse_util.unflatten_dict(leaves), prefix)


def write_encoder(folder: Path, config: dict[str, Any], file: str, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = networks.vae_network(SD_VAE, dtype=jnp.float32)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    tensors = {}
    for name, tensor in random_tensors(network, weights.VAE_PREFIX, image, jax.random.key(0)).items():
        for new, old in OLD_NAMES.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        tensors[name] = tensor
    folder = tmp_path_factory.mktemp("encoders") / "sd-vae"
    return write_encoder(folder, SD_VAE, "diffusion_pytorch_model.safetensors", tensors)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    """A whole CLIPModel with its own vocabulary."""
    ids = jax.ShapeDtypeStruct((1, 77), jnp.int32)
    text = networks.text_network(CLIP_L, project=True, skip_layers=0, final_norm=True, dtype=jnp.float32)
    side = VISION_TOWER["image_size"]
    vision = networks.vision_network(CLIP_L, project=True, dtype=jnp.float32)
    tensors = {
        **random_tensors(text, weights.TEXT_PREFIX, ids, jax.ShapeDtypeStruct(ids.shape, bool)),
        **random_tensors(vision, weights.VISION_PREFIX, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)),
        "logit_scale": np.array(CLIP_L["logit_scale_init_value"], np.float16),
        "text_model.embeddings.position_ids": np.arange(77)[None],
        "vision_model.embeddings.position_ids": np.arange(1 + (side // VISION_TOWER["patch_size"]) ** 2)[None],
    }
    folder = write_encoder(tmp_path_factory.mktemp("encoders") / "clip", CLIP_L, "model.safetensors", tensors)
    for file in (shared_data / "clip_tokenizer").glob("*.*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    """A folder with some of the emoji and their names."""
    folder = tmp_path_factory.mktemp("emoji")
    lines = (shared_data / "emoji" / "metadata.jsonl").read_text().splitlines()
    chosen = lines[:: len(lines) // PICTURES][:PICTURES]
    for line in chosen:
        shutil.copy(shared_data / "emoji" / json.loads(line)["file_name"], folder)
    (folder / "metadata.jsonl").write_text("\n".join(chosen))
    return folder


def program(name: str, *flags: str) -> str:
    """What a program of the package prints, started as a user does, on one device."""
    command = [sys.executable, "-m", f"dit_jax.{name}", *flags]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def train_small(workdir: Path, **changes: Any) -> str:
    """Train configs/small.py with further overrides; dots of keys are written as double underscores."""
    overrides = {"log_every": 1, "save_every": 0, "sample_every": 0, **changes}
    flags = [f"--config.{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    return program("main", "--config=configs/small.py", f"--workdir={workdir}", *flags)


def rows(workdir: Path) -> list[dict[str, float]]:
    """Of every step its row of ``metrics.jsonl``, which must be those from 1 on."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    return found


@pytest.mark.slow
def test_the_small_model_trains_resumes_and_draws_beside_encoders_of_the_published_size(
    vae_folder, text_folder, pictures, tmp_path
):
    run = tmp_path / "run"
    flags = {
        "vae": vae_folder,
        "text_encoder": text_folder,
        "data__source": f"folder:{pictures}",
        "data__flip": "off",  # half of the pictures to encode
        "batch_size": 2,
        "total_steps": 2,
    }
    out = train_small(run, **flags, stop_at_step=1)
    assert f"records, {IMAGE_SIZE} px" in out and "a new run" in out and "done: step 1 of 2" in out
    (count,) = re.findall(r"parameters: ([\d,]+);", out)
    assert round(int(count.replace(",", "")) / 1e6, 1) == 19.9

    out = train_small(run, **flags)
    assert "resuming from step 1" in out and "saved step=2" in out and "done: step 2 of 2" in out
    first, second = rows(run)
    assert 0.5 < first["loss"] < 2 and 0.5 < second["loss"] < 2  # of a model that has learnt nothing yet

    vae = describe_vae(vae_folder)
    params = named_leaves(open_stored(run, "raw", None).restore(vae.factor))
    assert all(np.isfinite(leaf).all() for leaf in params.values())
    assert (IMAGE_SIZE // vae.factor, vae.channels) == (32, 4)
    assert params["pos_embed/table"].shape == (16, 16, 384)  # a token for 2 x 2 latents
    assert params["x_embedder/proj/kernel"].shape == (2 * 2 * 4, 384)
    assert params["y_embedder/proj/kernel"].shape == (768, 384)

    out = program("sample", f"--model={run}", "--prompt=red apple", "--steps=2", f"--output={tmp_path / 'drawn'}")
    assert "step 2, ema parameters" in out
    with Image.open(tmp_path / "drawn" / "00000.png") as picture:
        assert picture.size == (IMAGE_SIZE, IMAGE_SIZE) and picture.info["prompt"] == "red apple"
        assert picture.info["step"] == "2" and np.asarray(picture).std() > 10


# The small model beside the embedded encoders, on the drawn shapes.
EMBEDDED = {
    "vae": "embedded",
    "text_encoder": "embedded",
    "data__source": "shapes",
    "data__num_pictures": 64,
    "batch_size": 4,
}
THREE_STEPS = {**EMBEDDED, "data__num_pictures": 8, "total_steps": 3}


@pytest.mark.slow
def test_the_small_model_learns(tmp_path):
    """Three hundred steps on the CPU; the warm-up is cut to thirty."""
    train_small(tmp_path, **EMBEDDED, total_steps=300)
    loss = [row["loss"] for row in rows(tmp_path)]
    assert len(loss) == 300 and np.mean(loss[-30:]) < 0.35 * np.mean(loss[:30])


@pytest.fixture(scope="module")
def exact_rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Three steps in float32."""
    run = tmp_path_factory.mktemp("exact")
    train_small(run, **THREE_STEPS, dtype="float32")
    return rows(run)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_train_as_float32_does(dtype, exact_rows, tmp_path):
    out = train_small(tmp_path, **THREE_STEPS, dtype=dtype)
    assert f"compute in {dtype}" in out
    for row, exact in zip(rows(tmp_path), exact_rows, strict=True):
        assert row["loss"] == pytest.approx(exact["loss"], rel=1e-3)
        assert 0 < abs(row["grad_norm"] / exact["grad_norm"] - 1) < 0.02
