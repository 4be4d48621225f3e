"""A config made complete: what depends on data and encoders is filled in, and what cannot go together is refused."""

import importlib.util
import math
import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from dit_jax.errors import ConfigError

if TYPE_CHECKING:
    from dit_jax.encoders import TextShape, VAEShape


def resolve(
    config: ConfigDict, num_records: int, vae: "VAEShape", text_encoder: "TextShape", num_shards: int
) -> list[str]:
    """Fill in place what depends on the data and the encoders, and check that all fits together.

    Args:
      config: of the run.
      num_records: that there are to train on.
      vae, text_encoder: what is known of them.
      num_shards: into how many parts the devices cut a batch.

    Returns:
      Warnings, one line each.

    Raises:
      ConfigError: values that cannot go together, each with the key that mends it.
    """
    notes = []
    check_ranges(config)
    for key, choices in CHOICES.items():
        choose(key, operator.attrgetter(key)(config), dict.fromkeys(choices))
    if not config.total_steps:
        if not config.total_epochs:
            raise ConfigError("total_steps and total_epochs are both 0; set one of them")
        config.total_steps = -(-config.total_epochs * num_records // config.batch_size)
    if config.total_steps < 1:
        raise ConfigError(f"total_steps is {config.total_steps}; it must be 1 or more")
    if config.warmup_steps >= config.total_steps:
        cut = config.total_steps // 10
        notes.append(f"warmup_steps {config.warmup_steps} >= total_steps {config.total_steps}: cut to {cut}")
        config.warmup_steps = cut
    if config.batch_size % (config.accumulate * num_shards):
        raise ConfigError(
            f"batch_size {config.batch_size} is not divisible by accumulate {config.accumulate} x {num_shards} devices"
            " that share it"
        )
    if config.validate_every and not config.data.validation_fraction:
        raise ConfigError(
            f"validate_every is {config.validate_every}, but no records are set aside to validate on: set"
            " data.validation_fraction, as in --config.data.validation_fraction=0.01, or validate_every=0"
        )
    if config.keep_best and not config.validate_every:
        raise ConfigError(
            f"keep_best is {config.keep_best}, but nothing is validated: set validate_every to how often, as in"
            f" --config.validate_every={config.save_every}, or keep_best=0"
        )
    if config.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ConfigError("wandb_project is set, but wandb is not installed: pip install 'dit_jax[wandb]'")
    if config.data.encode == "once" and config.data.crop == "random":
        raise ConfigError("data.crop=random needs data.encode=every_step: pictures that are encoded once are cut once")
    for key, value in {
        "text_length": text_encoder.length,
        "text_width": text_encoder.width,
        "pooled_width": text_encoder.pooled_width,
    }.items():
        if config.model[key] not in (0, value):
            raise ConfigError(f"model.{key} is {config.model[key]}, but {config.text_encoder} has {value}; set it to 0")
        config.model[key] = value
    if config.model.in_channels != vae.channels:
        raise ConfigError(f"model.in_channels is {config.model.in_channels}, but {config.vae} has {vae.channels}")
    shift, scale = len(config.latents.shift), len(config.latents.scale)
    if (shift, scale) not in ((0, 0), (config.model.in_channels, config.model.in_channels)):
        raise ConfigError(
            f"latents.shift has {shift} numbers and latents.scale {scale}; give"
            f" {config.model.in_channels} of each, or none of both"
        )
    if not all(map(math.isfinite, (*config.latents.shift, *config.latents.scale))) or 0 in config.latents.scale:
        raise ConfigError(
            f"latents.shift is {config.latents.shift} and latents.scale {config.latents.scale}; all must be finite, and"
            " no scale 0"
        )
    unit = vae.factor * config.model.patch_size
    if config.data.image_size % unit or config.data.image_size < unit:
        raise ConfigError(
            f"data.image_size is {config.data.image_size}; it must be a multiple of {unit}"
            f" ({vae.factor} of the VAE x model.patch_size {config.model.patch_size})"
        )
    if config.model.rope or config.model.positions == "sincos":
        patches = config.data.image_size // unit
        config.model.base_grid = config.model.base_grid or patches
        if config.model.base_grid != patches:
            notes.append(
                f"model.base_grid is {config.model.base_grid}, and {config.data.image_size} px have {patches} patches"
                " along a side: places are measured on another grid than that of these pictures"
            )
    if config.model.out_channels != config.model.in_channels and config.diffusion.prediction == "x0":
        raise ConfigError(
            f"model.out_channels is {config.model.out_channels}, with a learned variance, whose loss has no bound for"
            " diffusion.prediction=x0; take epsilon, v or flow"
        )
    return notes


# What the values of some keys can be, where no object is made of them.
CHOICES = {
    "verify_checkpoints": ("fast", "full"),
    "moment_dtype": ("bfloat16", "float32"),
    "data.encode": ("once", "every_step"),
    "data.storage_dtype": ("float16", "float32"),
    "data.flip": ("on", "off", "auto"),
    "data.crop": ("center", "random"),
    "latents.normalize": ("vae", "measured"),
}

# What the values of some keys must be, in words and as a test that nan does not pass.
RANGES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    (
        "1 or more",
        lambda x: x >= 1,
        (
            "batch_size",
            "accumulate",
            "mesh.tensor",
            "keep_latest",
            "max_skipped_in_a_row",
            "model.patch_size",
            "data.image_size",
            "sample.steps",
            "data.validation_records",
        ),
    ),
    (
        "0 or more",
        lambda x: 0 <= x < math.inf,
        (
            "warmup_steps",
            "stop_at_step",
            "max_hours",
            "stall_patience",
            "log_every",
            "save_every",
            "sample_every",
            "validate_every",
            "keep_every",
            "keep_best",
            "data.workers",
            "data.patience",
            "learning_rate",
            "weight_decay",
            "model.base_grid",
            "model.num_registers",
            "sample.guidance_scale",
            "sample.apg_norm",
        ),
    ),
    (
        "above 0",
        lambda x: 0 < x < math.inf,
        ("model.mlp_ratio", "model.time_scale", "diffusion.variance_weight", "sample.grid_shift", "sample.grid_rho"),
    ),
    ("above 0", lambda x: x > 0, ("clip_norm",)),
    ("in [0, 1)", lambda x: 0 <= x < 1, ("adam_b1", "adam_b2", "muon_momentum", "ema_decay")),
    (
        "in [0, 1]",
        lambda x: 0 <= x <= 1,
        (
            "model.dropout",
            "caption_dropout",
            "data.max_bad_fraction",
            "sample.eta",
            "sample.guidance_rescale",
            "sample.apg_parallel",
            "sample.strength",
        ),
    ),  # fmt: skip
    ("in [0, 255]", lambda x: 0 <= x <= 255, ("data.buckets",)),
    ("in [0, 2**32)", lambda x: 0 <= x < 2**32, ("seed",)),
)


def check_ranges(config: ConfigDict) -> None:
    """Refuse values that cannot be, whatever goes with them."""
    for words, holds, keys in RANGES:
        for key in keys:
            value = operator.attrgetter(key)(config)
            if not holds(value):
                raise ConfigError(f"{key} is {value}; it must be {words}")
    interval = config.sample.guidance_interval
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
        raise ConfigError(f"sample.guidance_interval is {interval}; it must be two times, 0 <= low <= high <= 1")


def choose(key: str, name: str, choices: Mapping[str, Any]) -> Any:
    """What a name stands for; ConfigError lists what it can be."""
    if name not in choices:
        raise ConfigError(f"{key} is {name!r}; it can be {', '.join(choices)}")
    return choices[name]
