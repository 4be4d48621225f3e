"""Objects from a config: gaps that are filled from data and encoders, and values that are refused."""

from types import SimpleNamespace

import pytest

from dit_jax import build
from dit_jax.config import load_config
from dit_jax.errors import ConfigError
from tests.tiny_run import tiny_config


def encoders(**changes):
    """Stand-ins for the frozen encoders, as far as `resolve` looks at them."""
    text = SimpleNamespace(name="clip", length=77, width=768, pooled_width=512)
    vae = SimpleNamespace(name="vae", factor=8, network=SimpleNamespace(latent_channels=4))
    return [vae, SimpleNamespace(**{**vars(text), **changes})]


def test_gaps_are_filled_from_the_encoders_and_epochs_from_the_data():
    config = tiny_config(total_steps="0", total_epochs="3", batch_size="10", warmup_steps="999")
    warnings = build.resolve(config, 25, *encoders(), 2)
    assert config.total_steps == 8  # 3 x 25 pictures, 10 a step
    assert config.warmup_steps == 0 and "warmup_steps 999 >= total_steps 8: cut to 0" in warnings[0]
    assert (config.model.text_length, config.model.text_width, config.model.pooled_width) == (77, 768, 512)
    explicit = tiny_config(total_steps="20", total_epochs="3")
    build.resolve(explicit, 25, *encoders(), 2)
    assert explicit.total_steps == 20


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"total_steps": "0"}, "total_steps and total_epochs are both 0"),
        ({"model__text_width": "512"}, "model.text_width is 512, but clip has 768"),
        ({"batch_size": "0"}, "batch_size is 0"),
        ({"accumulate": "3"}, "batch_size 8 is not divisible by accumulate 3 x 2 devices"),
        ({"data__image_size": "8"}, "data.image_size is 8; it must be a multiple of 16"),
    ],
)
def test_values_that_cannot_go_together_are_refused(change, says):
    with pytest.raises(ConfigError, match=says):
        build.resolve(tiny_config(**change), 25, *encoders(), 2)


def test_the_compute_dtype_follows_the_device():
    assert build.compute_dtype("auto", "cpu") == build.compute_dtype("float32", "gpu")
    assert build.compute_dtype("auto", "gpu") == build.compute_dtype("bfloat16", "cpu")


def test_every_shipped_config_makes_a_process():
    for name in ("quickstart", "small", "emoji"):
        build.make_process(load_config(f"configs/{name}.py", {}))
