"""From a published ``config.json`` to a network: the keys that we read, and what absent keys mean."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from dit_jax.encoders import weights
from dit_jax.encoders.clip import ACTIVATIONS, CLIPTextModel, CLIPVisionModel
from dit_jax.encoders.joined import JoinedTextModel
from dit_jax.encoders.latents import LatentScale, scale_from_factors
from dit_jax.encoders.taesd import SCALING_FACTOR, AutoencoderTiny
from dit_jax.encoders.vae import AutoencoderKL

Config = dict[str, Any]
VAENetwork = AutoencoderKL | AutoencoderTiny
TextNetwork = CLIPTextModel | JoinedTextModel

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

TINY_VAE_DEFAULTS: Config = {
    "in_channels": 3,
    "out_channels": 3,
    "encoder_block_out_channels": (64, 64, 64, 64),
    "decoder_block_out_channels": (64, 64, 64, 64),
    "latent_channels": 4,
    "num_encoder_blocks": (1, 3, 3, 3),
    "num_decoder_blocks": (3, 3, 3, 1),
}
# Of the same file, what the network takes as given: other values are refused. Its ``force_upcast`` is about float16.
TINY_VAE_FIXED: Config = {
    "act_fn": "relu",
    "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2,
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
}
# TAESD has siblings for other VAEs, with the same class but latents of another scale.
TINY_LATENT_CHANNELS = 4

TEXT_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel")
VISION_CLASSES = ("CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPModel")
VAE_CLASSES = ("AutoencoderKL", "AutoencoderTiny")

# By the type of a default: what a config may say in its place, and how that is called.
VALID: dict[type, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda value: isinstance(value, bool), "true or false"),
    int: (lambda value: type(value) is int and value >= 1, "a whole number of 1 or more"),
    float: (lambda value: type(value) in (int, float) and 0 < value < HUGE, "a number above 0"),
    str: (lambda value: isinstance(value, str), "a string"),
    tuple: (
        lambda value: isinstance(value, list | tuple) and bool(value) and all(map(VALID[int][0], value)),
        "a list of whole numbers of 1 or more",
    ),
    type(None): (
        lambda value: value is None or (type(value) in (int, float) and abs(value) < HUGE),
        "a number or null",
    ),
}
HUGE = 1e30
# How much of everything there may be: a layer is a module of its own, and a stage doubles a side. Ten times what there
# is in published networks.
MOST = {"num_hidden_layers": 1000, "layers_per_block": 100, "num_encoder_blocks": 100, "num_decoder_blocks": 100}
MOST_STAGES = 12
WIDEST = 2**20


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


def vae_network(config: Config, *, dtype: DTypeLike) -> VAENetwork:
    """The VAE of an AutoencoderKL or AutoencoderTiny config.

    Raises:
      ValueError: the config asks for what the network cannot do.
    """
    _check_class(config, VAE_CLASSES)
    return _tiny_vae(config, dtype) if _is_tiny(config) else _kl_vae(config, dtype)


def latent_scale(config: Config) -> LatentScale:
    """The map between raw and model latents that the config of a VAE states.

    Raises:
      ValueError: a factor is no number.
    """
    if _is_tiny(config):
        return scale_from_factors(SCALING_FACTOR, None, _with_defaults(config, TINY_VAE_DEFAULTS)["latent_channels"])
    factors = _with_defaults(config, LATENT_DEFAULTS)
    return scale_from_factors(**factors, channels=_with_defaults(config, VAE_DEFAULTS)["latent_channels"])


def open_vae(folder: Path, dtype: DTypeLike) -> tuple[VAENetwork, LatentScale]:
    """The VAE of a folder, without its weights, and the map of its latents.

    Raises:
      FileNotFoundError: there is no ``config.json``.
      ValueError: it is damaged, or of another network; the line names the file.
    """
    config = read_config(folder)
    with _naming(folder):
        return vae_network(config, dtype=dtype), latent_scale(config)


def open_text(
    folders: Sequence[Path], skip_layers: int | None, final_norm: bool | None, dtype: DTypeLike
) -> TextNetwork:
    """The text encoder of one folder or several, without its weights.

    Args:
      folders: of one tower each; several are joined.
      skip_layers: as in ``text_network``; None is 0 for one tower and 1 for joined ones.
      final_norm: as in ``text_network``; None is true for one tower and false for joined ones.
      dtype: compute type.

    Raises:
      FileNotFoundError: there is no ``config.json``.
      ValueError: one is damaged, or of another network, or the towers cannot be joined.
    """
    joined = len(folders) > 1
    skip_layers = int(joined) if skip_layers is None else skip_layers
    final_norm = not joined if final_norm is None else final_norm
    configs = [read_config(folder) for folder in folders]
    known = [folder for folder, config in zip(folders, configs, strict=True) if _is_of(config, TEXT_CLASSES)]
    if joined and len(known) < len(folders):
        foreign = next(folder for folder in folders if folder not in known)
        raise ValueError(
            f"{foreign} holds no CLIP but a {_published_class(read_config(foreign))}, which is not read; "
            f"name a tower alone instead: {' or '.join(map(str, known))}"
        )
    towers = []
    for folder, config in zip(folders, configs, strict=True):
        with _naming(folder):
            project = is_projected(config)
            tower = text_network(config, project=project, skip_layers=skip_layers, final_norm=final_norm, dtype=dtype)
        towers.append(tower)
    if len({tower.length for tower in towers}) > 1:
        lengths = ", ".join(f"{folder} {tower.length}" for folder, tower in zip(folders, towers, strict=True))
        raise ValueError(f"text towers of different lengths cannot be joined: {lengths}")
    return JoinedTextModel(tuple(towers)) if joined else towers[0]


def _kl_vae(config: Config, dtype: DTypeLike) -> AutoencoderKL:
    fields = _with_defaults(config, VAE_DEFAULTS)
    for key, known in (
        ("act_fn", ("silu", "swish")),
        ("down_block_types", ("DownEncoderBlock2D",)),
        ("up_block_types", ("UpDecoderBlock2D",)),
    ):
        found = config.get(key, known[0])
        unknown = [name for name in (found if isinstance(found, list | tuple) else [found]) if name not in known]
        if unknown:
            raise ValueError(f"{key} {unknown[0]!r:.100} is not known; known: {known[0]}")
    groups = fields["norm_num_groups"]
    if any(width % groups for width in fields["block_out_channels"]):
        raise ValueError(f"norm_num_groups={groups} must divide {fields['block_out_channels']}")
    return AutoencoderKL(**fields, dtype=dtype)


def _tiny_vae(config: Config, dtype: DTypeLike) -> AutoencoderTiny:
    fields = _with_defaults(config, TINY_VAE_DEFAULTS)
    for key, fixed in TINY_VAE_FIXED.items():
        if config.get(key, fixed) != fixed:
            raise ValueError(f"{key} of an AutoencoderTiny is {config[key]!r:.100}; only {fixed!r} is read")
    sides = [(f"{side}_block_out_channels", f"num_{side}_blocks") for side in ("encoder", "decoder")]
    for widths, counts in sides:
        if len(fields[widths]) != len(fields[counts]) or len(set(fields[widths])) > 1:
            raise ValueError(f"{widths} {fields[widths]} must be one width for each of {counts} {fields[counts]}")
    if len(fields["num_encoder_blocks"]) != len(fields["num_decoder_blocks"]):
        raise ValueError("num_encoder_blocks and num_decoder_blocks must have the same length")
    if fields["latent_channels"] != TINY_LATENT_CHANNELS:
        raise ValueError(
            f"latent_channels of an AutoencoderTiny is {fields['latent_channels']}; only the one of Stable "
            f"Diffusion 1 and 2 is read, which has {TINY_LATENT_CHANNELS}"
        )
    return AutoencoderTiny(**fields, dtype=dtype)


def is_projected(config: Config) -> bool:
    """Whether the published class of this config returns projected pooled states."""
    return _published_class(config).endswith("WithProjection")


def _published_class(config: Config) -> str:
    """The class that wrote the config, "" where it does not say."""
    name = config.get("_class_name") or config.get("architectures") or ""
    name = str(name[0] if isinstance(name, list) else name)[:100]
    return name if name.isprintable() else ascii(name)


def _is_of(config: Config, known: tuple[str, ...]) -> bool:
    """Whether a config is of one of these classes, or does not say. Flax classes wrote the same configs."""
    return _published_class(config).removeprefix("Flax") in ("", *known)


def _is_tiny(config: Config) -> bool:
    return _published_class(config) == "AutoencoderTiny"


def _check_class(config: Config, known: tuple[str, ...]) -> None:
    """Refuses the config of another network."""
    if not _is_of(config, known):
        raise ValueError(f"the class is {_published_class(config)}; expected {' or '.join(known)}")


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Lets errors say which file they speak of."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None


def _with_defaults(config: Config, defaults: Config) -> Config:
    """The keys of ``defaults``, from the config where it has them; other keys are not ours to judge."""
    fields = {key: config.get(key, default) for key, default in defaults.items()}
    for key, value in fields.items():
        holds, words = VALID[type(defaults[key])]
        if not holds(value):
            raise ValueError(f"{key} is {value!r:.100}; it must be {words}")
        parts = value if isinstance(value, list | tuple) else [value]
        most = MOST.get(key, WIDEST)
        if len(parts) > MOST_STAGES or any(type(part) is int and part > most for part in parts):
            raise ValueError(f"{key} is {value!r:.100}; no network is that large")
        fields[key] = tuple(value) if isinstance(value, list) else value
    return fields


def _tower_fields(config: Config, section: str, defaults: Config, project: bool) -> Config:
    """The fields of one CLIP tower, from its own config or from its section of a CLIPModel config."""
    if section in config or f"{section}_dict" in config:
        # A CLIPModel projects both towers to one width, which it states at the top. Old files keep the
        # keys that differ from the defaults in a second section, which wins.
        tower: Config = {}
        for part in (config.get(section) or {}, config.get(f"{section}_dict") or {}):
            if not isinstance(part, dict):
                raise ValueError(f"{section} is a {type(part).__name__}; it must be an object")
            tower |= part
        tower["projection_dim"] = config.get("projection_dim", defaults["projection_dim"])
    else:
        tower = config
    fields = _with_defaults(tower, defaults)
    if fields["hidden_act"] not in ACTIVATIONS:
        raise ValueError(f"hidden_act {fields['hidden_act']!r:.100} is not known; known: {', '.join(ACTIVATIONS)}")
    if fields["hidden_size"] % fields["num_attention_heads"]:
        raise ValueError(
            f"hidden_size={fields['hidden_size']} is not a multiple of "
            f"num_attention_heads={fields['num_attention_heads']}"
        )
    if not project:
        fields["projection_dim"] = None
    return fields
