"""What a config.json means: absent keys are the published classes' defaults, foreign ones are refused."""

import inspect
import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from dit_jax.encoders import networks

GOLDEN = Path(__file__).parent / "golden"
TINY = {"_class_name": "AutoencoderTiny"}


def text(config, **changes):
    arguments = {"project": False, "skip_layers": 0, "final_norm": True, "dtype": jnp.float32}
    return networks.text_network(config, **{**arguments, **changes})


def test_the_table_of_clip_is_that_of_the_published_classes():
    from transformers import CLIPTextConfig, CLIPVisionConfig

    for ours, theirs in (
        (networks.TEXT_DEFAULTS, CLIPTextConfig()),
        (networks.VISION_DEFAULTS, CLIPVisionConfig()),
    ):
        assert ours == {key: getattr(theirs, key) for key in ours}


@pytest.mark.parametrize(
    "published_class, ours, not_read",
    [
        (
            "AutoencoderKL",
            {**networks.VAE_DEFAULTS, **networks.LATENT_DEFAULTS},
            {"down_block_types", "up_block_types", "act_fn", "sample_size", "force_upcast"}
            | {"latents_mean", "latents_std"},
        ),
        ("AutoencoderTiny", {**networks.TINY_VAE_DEFAULTS, **networks.TINY_VAE_FIXED}, {"force_upcast"}),
    ],
)
def test_the_tables_of_the_vaes_are_those_of_the_published_classes(published_class, ours, not_read):
    diffusers = pytest.importorskip("diffusers")
    parameters = dict(inspect.signature(getattr(diffusers, published_class).__init__).parameters)
    del parameters["self"]
    assert ours == {key: parameter.default for key, parameter in parameters.items() if key not in not_read}


def test_absent_keys_take_the_defaults_and_foreign_ones_are_left_alone():
    network = text({"hidden_size": 768, "num_attention_heads": 12, "attention_dropout": 0.0})
    assert (network.hidden_size, network.num_hidden_layers, network.vocab_size) == (768, 12, 49408)


def test_a_whole_clip_states_the_projection_at_the_top_and_old_ones_a_second_section():
    config = {
        "architectures": ["CLIPModel"],
        "projection_dim": 768,
        "text_config": {"num_hidden_layers": 3, "projection_dim": 512},
        "text_config_dict": {"hidden_size": 768, "num_attention_heads": 12},
        "vision_config": {"patch_size": 14},
        "vision_config_dict": None,
    }
    network = text(config, project=True)
    assert (network.hidden_size, network.num_hidden_layers, network.projection_dim) == (768, 3, 768)
    vision = networks.vision_network(config, project=True, dtype=jnp.float32)
    assert (vision.patch_size, vision.projection_dim) == (14, 768)
    assert text(config).projection_dim is None


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: text({"hidden_act": "relu"}), "hidden_act 'relu' is not known; known: quick_gelu, gelu"),
        (lambda: text({"hidden_size": 100}), "hidden_size=100 is not a multiple of num_attention_heads=8"),
        (lambda: text({}, skip_layers=13), "skip_layers=13 of a network with 12 layers"),
        (lambda: text({"architectures": ["T5EncoderModel"]}), "the class is T5EncoderModel; expected CLIPTextModel"),
    ],
)
def test_text_configs_that_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "config, message",
    [
        ({"_class_name": "VQModel"}, "the class is VQModel; expected AutoencoderKL or AutoencoderTiny"),
        ({"act_fn": "mish"}, "act_fn 'mish' is not known; known: silu"),
        (
            {"down_block_types": ["AttnDownEncoderBlock2D"]},
            "down_block_types 'AttnDownEncoderBlock2D' is not known; known: DownEncoderBlock2D",
        ),
        ({"block_out_channels": [48]}, r"norm_num_groups=32 must divide \(48,\)"),
        ({**TINY, "act_fn": "gelu"}, "act_fn of an AutoencoderTiny is 'gelu'; only 'relu' is read"),
        ({**TINY, "upsampling_scaling_factor": 3}, "upsampling_scaling_factor .* is 3; only 2 is read"),
        ({**TINY, "latent_channels": 16}, "is 16; only the one of Stable Diffusion 1 and 2 is read, which has 4"),
        ({**TINY, "num_encoder_blocks": [1]}, "encoder_block_out_channels .* one width for each of num_encoder_blocks"),
        ({**TINY, "decoder_block_out_channels": [64, 64, 64, 32]}, "decoder_block_out_channels .* must be one width"),
    ],
)
def test_vae_configs_that_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        networks.vae_network(config, dtype=jnp.float32)


@pytest.mark.parametrize("content", [b"{", b"[]", b"null", b'{"a": "\xe9"}'])
def test_a_damaged_config_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path / 'config.json'} is damaged: "):
        networks.read_config(tmp_path)


@pytest.mark.parametrize(
    "case, key, value, words",
    [
        ("text_sd1", "hidden_size", "768", "'768'; it must be a whole number of 1 or more"),
        ("text_sd1", "hidden_size", [768], "[768]; it must be a whole number of 1 or more"),
        ("text_sd1", "num_attention_heads", 0, "0; it must be a whole number of 1 or more"),
        ("text_sd1", "num_attention_heads", True, "True; it must be a whole number of 1 or more"),
        ("text_sd1", "hidden_act", ["gelu"], "['gelu']; it must be a string"),
        ("text_sd1", "layer_norm_eps", None, "None; it must be a number above 0"),
        ("clip", "text_config", [1], "list; it must be an object"),
        ("vae_sd", "block_out_channels", 64, "64; it must be a list of whole numbers of 1 or more"),
        ("vae_sd", "block_out_channels", [64, "64"], "[64, '64']; it must be a list of whole numbers of 1 or more"),
        ("vae_sd", "use_quant_conv", 1, "1; it must be true or false"),
        ("vae_sd", "scaling_factor", "0.18", "'0.18'; it must be a number above 0"),
        ("vae_sd", "shift_factor", [0], "[0]; it must be a number or null"),
        ("vae_sd", "down_block_types", 5, "known; known: DownEncoderBlock2D"),
        ("vae_sd", "act_fn", {}, "known; known: silu"),
        ("vae_sd", "_class_name", 5, "5; expected AutoencoderKL or AutoencoderTiny"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_its_file(tmp_path, case, key, value, words):
    config = networks.read_config(GOLDEN / case)
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ValueError) as error:
        if case.startswith("vae"):
            networks.open_vae(tmp_path, jnp.float32)
        else:
            networks.open_text([tmp_path], None, None, jnp.float32)
    line = str(error.value)
    assert line.startswith(f"{tmp_path / 'config.json'}: ") and line.endswith(words) and "\n" not in line
    assert key.removeprefix("_").removesuffix("_name") in line
