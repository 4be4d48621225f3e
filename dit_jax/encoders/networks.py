"""From a published ``config.json`` to a network: the keys that we read, and what absent keys mean."""

from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from dit_jax.encoders import weights
from dit_jax.encoders.clip import ACTIVATIONS, CLIPTextModel, CLIPVisionModel
from dit_jax.encoders.vae import AutoencoderKL

Config = dict[str, Any]

# What the published classes assume for a key that config.json leaves out.
TEXT_DEFAULTS: Config = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
    "projection_dim": 512,
}
VISION_DEFAULTS: Config = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 512,
}
VAE_DEFAULTS: Config = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
# Of the same file, but for latents.py: how raw latents become model latents.
LATENT_DEFAULTS: Config = {"scaling_factor": 0.18215, "shift_factor": None}

TEXT_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel")
VISION_CLASSES = ("CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPModel")
VAE_CLASSES = ("AutoencoderKL",)


def read_config(folder: Path) -> Config:
    """The folder's ``config.json``.

    Raises:
      FileNotFoundError: the file is not there.
      ValueError: the file is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no config.json in {folder}")
    return weights.read_json(path)


def text_network(
    config: Config, *, project: bool, skip_layers: int, final_norm: bool, dtype: DTypeLike
) -> CLIPTextModel:
    """The text tower of a CLIPTextModel or CLIPModel config.

    Args:
      config: of the tower alone, or of a whole CLIPModel.
      project: whether ``pooled`` goes through the text projection.
      skip_layers: how many of the last blocks ``hidden`` leaves out.
      final_norm: whether the final norm is applied to ``hidden``.
      dtype: compute type.

    Raises:
      ValueError: the config asks for what the network cannot do.
    """
    _check_class(config, TEXT_CLASSES)
    fields = _tower_fields(config, "text_config", TEXT_DEFAULTS, project)
    if not 0 <= skip_layers <= fields["num_hidden_layers"]:
        raise ValueError(f"skip_layers={skip_layers} of a network with {fields['num_hidden_layers']} layers")
    return CLIPTextModel(**fields, skip_layers=skip_layers, final_norm=final_norm, dtype=dtype)


def vision_network(config: Config, *, project: bool, dtype: DTypeLike) -> CLIPVisionModel:
    """The vision tower of a CLIPVisionModel or CLIPModel config; arguments as in ``text_network``."""
    _check_class(config, VISION_CLASSES)
    return CLIPVisionModel(**_tower_fields(config, "vision_config", VISION_DEFAULTS, project), dtype=dtype)


def vae_network(config: Config, *, dtype: DTypeLike) -> AutoencoderKL:
    """The VAE of an AutoencoderKL config.

    Raises:
      ValueError: the config asks for what the network cannot do.
    """
    _check_class(config, VAE_CLASSES)
    blocks = {*config.get("down_block_types", ()), *config.get("up_block_types", ())}
    if config.get("act_fn", "silu") not in ("silu", "swish"):
        raise ValueError(f"act_fn {config['act_fn']!r} of the VAE is not known; known: silu")
    if unknown := blocks - {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
        raise ValueError(f"VAE blocks {sorted(unknown)} are not known; known: DownEncoderBlock2D, UpDecoderBlock2D")
    fields = _with_defaults(config, VAE_DEFAULTS)
    fields["block_out_channels"] = tuple(fields["block_out_channels"])
    groups = fields["norm_num_groups"]
    if any(width % groups for width in fields["block_out_channels"]):
        raise ValueError(f"norm_num_groups={groups} must divide {fields['block_out_channels']}")
    return AutoencoderKL(**fields, dtype=dtype)


def is_projected(config: Config) -> bool:
    """Whether the published class of this config returns projected pooled states."""
    return _published_class(config).endswith("WithProjection")


def _published_class(config: Config) -> str:
    """The class that wrote the config, "" where it does not say."""
    return config.get("_class_name") or (config.get("architectures") or [""])[0]


def _check_class(config: Config, known: tuple[str, ...]) -> None:
    """Refuses the config of another network."""
    if _published_class(config) not in ("", *known):
        raise ValueError(f"config.json is of {_published_class(config)}; expected {' or '.join(known)}")


def _with_defaults(config: Config, defaults: Config) -> Config:
    """The keys of ``defaults``, from the config where it has them; other keys are not ours to judge."""
    return {key: config.get(key, default) for key, default in defaults.items()}


def _tower_fields(config: Config, section: str, defaults: Config, project: bool) -> Config:
    """The fields of one CLIP tower, from its own config or from its section of a CLIPModel config."""
    if section in config or f"{section}_dict" in config:
        # A CLIPModel projects both towers to one width, which it states at the top. Old files keep the
        # keys that differ from the defaults in a second section, which wins.
        tower = {**(config.get(section) or {}), **(config.get(f"{section}_dict") or {})}
        tower["projection_dim"] = config.get("projection_dim", defaults["projection_dim"])
    else:
        tower = config
    fields = _with_defaults(tower, defaults)
    if fields["hidden_act"] not in ACTIVATIONS:
        raise ValueError(f"hidden_act {fields['hidden_act']!r} is not known; known: {', '.join(ACTIVATIONS)}")
    if fields["hidden_size"] % fields["num_attention_heads"]:
        raise ValueError(
            f"hidden_size={fields['hidden_size']} is not a multiple of "
            f"num_attention_heads={fields['num_attention_heads']}"
        )
    if not project:
        fields["projection_dim"] = None
    return fields
