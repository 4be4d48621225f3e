"""Configs: typed overrides, a lossless round trip, and gaps that are filled from data and encoders."""

import json
from types import SimpleNamespace

import pytest

from configs import default
from dit_jax import build
from dit_jax.errors import CheckpointError, ConfigError
from tests.tiny_run import tiny_config


def encoders(**changes):
    """Stand-ins for the frozen encoders, as far as `resolve` looks at them."""
    text = SimpleNamespace(name="clip", length=77, width=768, pooled_width=512)
    vae = SimpleNamespace(name="vae", factor=8, network=SimpleNamespace(latent_channels=4))
    return [vae, SimpleNamespace(**{**vars(text), **changes})]


def test_overrides_take_the_type_of_what_they_replace():
    config = default.get_config()
    build.apply_overrides(
        config,
        {
            "total_steps": "1_000",
            "learning_rate": "3e-4",
            "model.num_layers": "12",
            "model.dropout": "0",
            "vae": "some/folder",
            "sample.prompts": "a red circle,a blue square",
        },
    )
    assert config.total_steps == 1000 and config.learning_rate == 3e-4 and config.model.num_layers == 12
    assert isinstance(config.model.dropout, float) and config.vae == "some/folder"
    assert config.sample.prompts == ("a red circle", "a blue square")
    build.apply_overrides(config, {"sample.prompts": "['one, with a comma']"})
    assert config.sample.prompts == ("one, with a comma",)


@pytest.mark.parametrize("text", ["1.5", "x", ""])
def test_a_value_of_another_type_is_refused(text):
    with pytest.raises(ConfigError, match=f"batch_size takes a int, not '{text}'"):
        build.apply_overrides(default.get_config(), {"batch_size": text})


def test_a_config_file_takes_overrides_inline_and_from_flags():
    config = build.load_config("configs/small.py:batch_size=64,model.num_layers=2", {"batch_size": "32"})
    assert config.batch_size == 32 and config.model.num_layers == 2


def test_a_resolved_config_comes_back_from_json(tmp_path):
    config = tiny_config()
    path = tmp_path / "config.json"
    path.write_text(build.to_json(config))
    again = build.load_config(str(path), {"batch_size": "16"})
    assert build.differences(config, again) == ["batch_size: 8 -> 16"]
    config.latents.scale = (2.0,)  # measured by that run; another one measures for itself
    path.write_text(build.to_json(config))
    assert build.load_config(str(path), {}).latents.scale == ()
    assert again.sample.prompts == config.sample.prompts
    path.write_text("{")
    with pytest.raises(ConfigError, match="is not a config"):
        build.read_json(path)
    with pytest.raises(CheckpointError, match="no run in"):
        build.read_run(tmp_path / "nowhere")


def test_only_the_listed_keys_may_change():
    old, new = tiny_config(), tiny_config(log_every="7", sample__steps="9", stop_at_step="4")
    assert build.differences(old, new) == []
    assert all(key in build.flatten(default.get_config()) for key in build.CHANGEABLE)


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


def test_a_run_keeps_the_latent_scale_that_it_measured(tmp_path):
    old = tiny_config()
    old.latents.shift, old.latents.scale = (0.1,), (2.0,)
    (tmp_path / "config.json").write_text(build.to_json(old))
    again = tiny_config()
    build.take_over(again, tmp_path)
    assert again.latents.scale == (2.0,)
    with pytest.raises(ConfigError, match="latents.normalize: 'measured' -> 'vae'"):
        build.take_over(tiny_config(latents__normalize="vae"), tmp_path)


def test_the_compute_dtype_follows_the_device():
    assert build.compute_dtype("auto", "cpu") == build.compute_dtype("float32", "gpu")
    assert build.compute_dtype("auto", "gpu") == build.compute_dtype("bfloat16", "cpu")


def test_every_shipped_config_is_whole():
    for name in ("quickstart", "small", "emoji"):
        config = build.load_config(f"configs/{name}.py", {})
        assert build.flatten(config).keys() == build.flatten(default.get_config()).keys()
        build.make_process(config)
        json.loads(build.to_json(config))
