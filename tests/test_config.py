"""Configs: typed overrides, a lossless round trip, and what a resumed run may change."""

import json

import pytest

from configs import default
from dit_jax.config import (
    CHANGEABLE,
    apply_overrides,
    differences,
    load_config,
    name_of,
    read_json,
    read_run,
    take_over,
    to_json,
)
from dit_jax.errors import CheckpointError, ConfigError
from dit_jax.files import flatten
from tests.tiny_run import SHIPPED, tiny_config


def test_overrides_take_the_type_of_what_they_replace():
    config = default.get_config()
    apply_overrides(
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
    apply_overrides(config, {"sample.prompts": "['one, with a comma']"})
    assert config.sample.prompts == ("one, with a comma",)


@pytest.mark.parametrize("text", ["1.5", "x", ""])
def test_a_value_of_another_type_is_refused(text):
    with pytest.raises(ConfigError, match=f"batch_size takes an int, not '{text}'"):
        apply_overrides(default.get_config(), {"batch_size": text})


def test_a_config_file_takes_overrides_inline_and_from_flags():
    config = load_config("configs/small.py:batch_size=64,model.num_layers=2", {"batch_size": "32"})
    assert config.batch_size == 32 and config.model.num_layers == 2


def test_a_resolved_config_comes_back_from_json(tmp_path):
    config = tiny_config()
    path = tmp_path / "config.json"
    path.write_text(to_json(config))
    again = load_config(str(path), {"batch_size": "16"})
    assert differences(config, again) == ["batch_size: 8 -> 16"]
    config.latents.scale = (2.0,)  # measured by that run; another one measures for itself
    path.write_text(to_json(config))
    assert load_config(str(path), {}).latents.scale == ()
    assert again.sample.prompts == config.sample.prompts
    config.stop_at_step = 2  # of that run on that day
    path.write_text(to_json(config))
    assert load_config(str(path), {}).stop_at_step == 0 and read_run(tmp_path).stop_at_step == 2
    assert load_config(str(path), {"stop_at_step": "3"}).stop_at_step == 3
    path.write_text("{")
    with pytest.raises(ConfigError, match="is not a config"):
        read_json(path)
    with pytest.raises(CheckpointError, match="no run in"):
        read_run(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("raise ImportError", "does not make a config: ImportError"),
        ("def get_config(:", "does not make a config: SyntaxError: invalid syntax"),
        ("config = 1", "does not make a config: it needs a get_config() that returns a ConfigDict"),
        ("get_config = dict", "does not make a config: it needs a get_config() that returns a ConfigDict"),
        ("from ml_collections import ConfigDict as get_config", "it has no section latents, data, diffusion"),
        (
            "from configs import default\ndef get_config():\n    c = default.get_config()\n    c.learning_rat = 1",
            'AttributeError: Key "learning_rat" does not exist and cannot be added since the config is locked.'
            ' Did you mean "learning_rate" instead of "learning_rat"?',
        ),
        (
            "from configs import default\ndef get_config():\n    return default.get_config().modle",
            'AttributeError: \'modle\' Did you mean "model" instead of "modle"?',
        ),
    ],
)
def test_a_file_that_makes_no_config_is_one_clear_line(tmp_path, text, says):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(str(tmp_path / "mine.py"), {})
    said = str(error.value)
    assert str(tmp_path / "mine.py") in said and says in said and "\n" not in said and "batch_size" not in said


@pytest.mark.parametrize("text", ["[1]", "null", "{}", '{"model": 3}', '{"a.b": 1}'])
def test_json_that_is_no_config_is_one_clear_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    for read in (lambda: load_config(str(tmp_path / "config.json"), {}), lambda: read_run(tmp_path)):
        with pytest.raises(ConfigError, match="config.json is not a config: ") as error:
            read()
        assert "\n" not in str(error.value)


def test_only_the_listed_keys_may_change():
    old, new = tiny_config(), tiny_config(log_every="7", sample__steps="9", stop_at_step="4")
    assert differences(old, new) == []
    assert all(key in flatten(default.get_config()) for key in CHANGEABLE)


def test_a_run_keeps_the_latent_scale_that_it_measured(tmp_path):
    old = tiny_config()
    old.latents.shift, old.latents.scale = (0.1,), (2.0,)
    (tmp_path / "config.json").write_text(to_json(old))
    again = tiny_config()
    take_over(again, tmp_path, False)
    assert again.latents.scale == (2.0,)
    with pytest.raises(ConfigError, match="latents.normalize: 'measured' -> 'vae'"):
        take_over(tiny_config(latents__normalize="vae"), tmp_path, False)


def test_every_shipped_config_is_whole():
    for path in SHIPPED:
        config = load_config(str(path), {})
        assert flatten(config).keys() == flatten(default.get_config()).keys()
        json.loads(to_json(config))


def test_a_config_may_lie_in_the_home_folder(tmp_path, monkeypatch):
    """No shell expands ``~`` behind an equals sign."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.json").write_text(to_json(tiny_config()))
    assert load_config("~/config.json", {"seed": "3"}).seed == 3


@pytest.mark.parametrize(
    ("spec", "name"),
    [("configs/small.py", "small"), ("small.py:seed=1", "small"), ("runs/a/config.json", "a"), ("~/config.json", "me")],
)
def test_what_is_made_with_a_config_is_called_after_it(spec, name, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert name_of(spec) == name


@pytest.mark.parametrize("text", ["0.2,0.8", "(0.2, 0.8)", "[0.2,0.8]"])
def test_tuples_hold_numbers_but_for_prompts(text):
    config = default.get_config()
    apply_overrides(config, {"sample.guidance_interval": text, "latents.scale": "1,2", "sample.prompts": "7,8"})
    assert config.sample.guidance_interval == (0.2, 0.8) and config.latents.scale == (1.0, 2.0)
    assert config.sample.prompts == ("7", "8")
    with pytest.raises(ConfigError, match="guidance_interval takes a tuple, not 'low,high'"):
        apply_overrides(config, {"sample.guidance_interval": "low,high"})
