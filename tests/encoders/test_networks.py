"""What a config.json means: absent keys are the published classes' defaults, foreign ones are refused."""

import inspect

import jax.numpy as jnp
import pytest

from dit_jax.encoders import networks


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


def test_the_table_of_the_vae_is_that_of_the_published_class():
    diffusers = pytest.importorskip("diffusers")
    signature = inspect.signature(diffusers.AutoencoderKL.__init__)
    ours = {**networks.VAE_DEFAULTS, **networks.LATENT_DEFAULTS}
    assert ours == {key: signature.parameters[key].default for key in ours}


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
        (lambda: text({"architectures": ["T5EncoderModel"]}), "is of T5EncoderModel; expected CLIPTextModel"),
    ],
)
def test_text_configs_that_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "config, message",
    [
        ({"_class_name": "AutoencoderTiny"}, "is of AutoencoderTiny; expected AutoencoderKL"),
        ({"act_fn": "mish"}, "act_fn 'mish' of the VAE is not known; known: silu"),
        (
            {"down_block_types": ["AttnDownEncoderBlock2D"]},
            "VAE blocks .'AttnDownEncoderBlock2D'. are not known",
        ),
        ({"block_out_channels": [48]}, r"norm_num_groups=32 must divide \(48,\)"),
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
