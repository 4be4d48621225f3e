"""Objects from a config: gaps that are filled from data and encoders, and values that are refused."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax import build
from dit_jax.config import load_config
from dit_jax.encoders import TextShape, VAEShape
from dit_jax.errors import ConfigError
from dit_jax.resolve import resolve
from dit_jax.sharding import abstract_mesh
from tests.noise_pictures import SQUARE, draw_noise
from tests.tiny_run import SHIPPED, tiny_config

ENCODERS = (VAEShape(factor=8, channels=4), TextShape(length=77, width=768, pooled_width=512))


def test_gaps_are_filled_from_the_encoders_and_epochs_from_the_data():
    config = tiny_config(total_steps="0", total_epochs="3", batch_size="10", warmup_steps="999")
    warnings = resolve(config, 25, *ENCODERS, 2)
    assert config.total_steps == 8  # 3 x 25 pictures, 10 a step
    assert config.warmup_steps == 0 and "warmup_steps 999 >= total_steps 8: cut to 0" in warnings[0]
    assert (config.model.text_length, config.model.text_width, config.model.pooled_width) == (77, 768, 512)
    explicit = tiny_config(total_steps="20", total_epochs="3")
    resolve(explicit, 25, *ENCODERS, 2)
    assert explicit.total_steps == 20


def test_places_are_those_of_the_pictures_unless_told_and_then_it_is_said():
    for change, grid, noted in (({}, 0, 0), ({"model__rope": "true"}, 4, 0), ({"model__positions": "sincos"}, 4, 0),
                                ({"model__rope": "true", "model__base_grid": "9"}, 9, 1)):  # fmt: skip
        config = tiny_config(**change)
        notes = resolve(config, 25, *ENCODERS, 1)
        assert config.model.base_grid == grid
        assert sum("model.base_grid is 9, and 64 px have 4 patches" in note for note in notes) == noted


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"total_steps": "0"}, "total_steps and total_epochs are both 0"),
        ({"model__text_width": "512"}, "model.text_width is 512, but embedded has 768"),
        ({"batch_size": "0"}, "batch_size is 0"),
        ({"accumulate": "3"}, "batch_size 8 is not divisible by accumulate 3 x 2 devices"),
        ({"latents__shift": "0,0,0,0", "latents__scale": "1,1,0,1"}, "all must be finite, and no scale 0"),
        ({"latents__shift": "0,0,0,nan", "latents__scale": "1,1,1,1"}, "all must be finite, and no scale 0"),
        ({"data__image_size": "8"}, "data.image_size is 8; it must be a multiple of 16"),
        ({"sample__steps": "0"}, "sample.steps is 0; it must be 1 or more"),
        ({"model__patch_size": "0"}, "model.patch_size is 0; it must be 1 or more"),
        ({"total_steps": "-1"}, "total_steps is -1; it must be 1 or more"),
        ({"warmup_steps": "-1"}, "warmup_steps is -1; it must be 0 or more"),
        ({"stop_at_step": "-1"}, "stop_at_step is -1; it must be 0 or more"),
        ({"data__workers": "-1"}, "data.workers is -1; it must be 0 or more"),
        ({"learning_rate": "-1"}, "learning_rate is -1.0; it must be 0 or more"),
        ({"learning_rate": "nan"}, "learning_rate is nan; it must be 0 or more"),
        ({"save_every": "-5"}, "save_every is -5; it must be 0 or more"),
        ({"sample__guidance_scale": "inf"}, "sample.guidance_scale is inf; it must be 0 or more"),
        ({"sample__eta": "-1"}, "sample.eta is -1.0; it must be in [0, 1]"),
        ({"model__time_scale": "nan"}, "model.time_scale is nan; it must be above 0"),
        ({"diffusion__variance_weight": "0"}, "diffusion.variance_weight is 0.0; it must be above 0"),
        (
            {"model__out_channels": "8", "diffusion__prediction": "x0"},
            "model.out_channels is 8, with a learned variance, whose loss has no bound for diffusion.prediction=x0",
        ),
        ({"model__num_registers": "-1"}, "model.num_registers is -1; it must be 0 or more"),
        ({"clip_norm": "0"}, "clip_norm is 0.0; it must be above 0"),
        ({"clip_norm": "nan"}, "clip_norm is nan; it must be above 0"),
        ({"model__mlp_ratio": "0"}, "model.mlp_ratio is 0.0; it must be above 0"),
        ({"adam_b1": "1"}, "adam_b1 is 1.0; it must be in [0, 1)"),
        ({"adam_b2": "1.5"}, "adam_b2 is 1.5; it must be in [0, 1)"),
        ({"ema_decay": "1"}, "ema_decay is 1.0; it must be in [0, 1)"),
        ({"caption_dropout": "1.5"}, "caption_dropout is 1.5; it must be in [0, 1]"),
        ({"model__dropout": "-0.1"}, "model.dropout is -0.1; it must be in [0, 1]"),
        ({"seed": "-1"}, "seed is -1; it must be in [0, 2**32)"),
        ({"seed": str(10**20)}, f"seed is {10**20}; it must be in [0, 2**32)"),
        ({"latents__scale": "(1, 1, 1, 1)"}, "latents.shift has 0 numbers and latents.scale 4; give 4 of each"),
        (
            {"latents__scale": "(1, 1)", "latents__shift": "(0, 0)"},
            "latents.shift has 2 numbers and latents.scale 2; give 4 of each, or none of both",
        ),
    ],
)
def test_values_that_cannot_go_together_are_refused(change, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        resolve(tiny_config(**change), 25, *ENCODERS, 2)


def test_values_at_the_edge_of_what_they_may_be_are_taken():
    four = "(1, 1, 1, 1)"
    edges = {"seed": str(2**32 - 1), "clip_norm": "inf", "ema_decay": "0", "model__dropout": "0", "data__workers": "0"}
    resolve(tiny_config(**edges, latents__scale=four, latents__shift=four), 25, *ENCODERS, 2)


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ({"platform": "cpu"}, "float32"),
        ({"platform": "tpu"}, "bfloat16"),
        ({"platform": "gpu", "compute_capability": "7.0"}, "float16"),  # V100
        ({"platform": "gpu", "compute_capability": "7.5"}, "float16"),  # T4
        ({"platform": "gpu", "compute_capability": "8.0"}, "bfloat16"),  # A100
        ({"platform": "gpu", "compute_capability": "8.9"}, "bfloat16"),  # RTX 4090
        ({"platform": "gpu", "compute_capability": "12.0"}, "bfloat16"),  # RTX 5090: twelve, not one
        ({"platform": "gpu", "compute_capability": "gfx90a"}, "bfloat16"),  # MI250
    ],
)
def test_the_compute_dtype_follows_the_device_unless_asked_for(device, dtype):
    device = SimpleNamespace(**device)
    assert jnp.dtype(build.compute_dtype("auto", device)).name == dtype
    for name in ("float32", "bfloat16", "float16"):
        assert jnp.dtype(build.compute_dtype(name, device)).name == name
    with pytest.raises(ConfigError, match="dtype is 'half'; it can be auto, float32, bfloat16, float16"):
        build.compute_dtype("half", device)


def test_every_shipped_config_makes_a_process():
    for path in SHIPPED:
        build.make_process(load_config(str(path), {}))


def test_a_set_aside_caption_decides_on_mirror_images_too(tmp_path):
    """A cache is made of all records, a run trains on some: both must mirror the same pictures."""
    pictures = draw_noise(tmp_path / "pictures", [SQUARE] * 12)
    config = tiny_config(data__source=pictures, data__validation_fraction="0.5")
    names = [Path(id).name for id in build.make_source(config, "validation").ids()]
    rows = [json.loads(line) for line in (tmp_path / "pictures/metadata.jsonl").read_text().splitlines()]
    for says, flip in (("to the left", False), ("in the middle", True)):
        for row in rows:
            if row["file_name"] == names[0]:
                row["text"] = says
        (tmp_path / "pictures/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        training, everything = build.make_source(config, "train"), build.make_source(config, "all")
        shapes = build.make_shapes(config, 8)
        order = build.make_order(config, training, np.zeros(len(training), np.uint8))
        samples = build.make_samples(config, training, order, shapes)
        assert samples.flip == build.choose_flip(config, everything) == flip


def test_a_model_that_does_not_go_into_the_mesh_ends_in_one_line():
    """Before anything is written: the state is described where a run is gathered."""
    config = tiny_config(mesh__fsdp="3")
    config.model.update(text_length=5, text_width=7, pooled_width=6)
    model, (optimizer, _) = build.make_model(config, jnp.float32), build.make_optimizer(config)
    with pytest.raises(ConfigError, match=r"mesh.fsdp=3, mesh.tensor=1: fsdp is 3, and does not divide"):
        build.describe_state(config, model, optimizer, 8, abstract_mesh(3, 1))
