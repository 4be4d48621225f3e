"""The only place where a config becomes objects.

Above: programs, which hold a ConfigDict. Below: libraries, which take plain arguments and have no defaults.
Every ``make_*`` turns a part of a resolved config into one object. Where a config comes from is in `dit_jax.config`,
what completes it in `dit_jax.resolve`.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dit_jax import sharding
from dit_jax.errors import ConfigError
from dit_jax.resolve import choose

if TYPE_CHECKING:
    import optax
    from jax.sharding import AbstractMesh, Mesh

    from dit_jax.arrays import Array
    from dit_jax.data.bad_records import BadRecords
    from dit_jax.data.cache.gather import Cache
    from dit_jax.data.cache.parts import Identity
    from dit_jax.data.loader import Samples
    from dit_jax.data.order import Order
    from dit_jax.data.shapes_world import ShapesWorld
    from dit_jax.data.sources.records import Source
    from dit_jax.diffusion.guidance import Correction
    from dit_jax.diffusion.objectives import Times, Weight
    from dit_jax.diffusion.process import Process
    from dit_jax.diffusion.samplers import Sampler
    from dit_jax.encoders import VAE, TextEncoder, TextShape, VAEShape
    from dit_jax.encoders.latents import LatentScale
    from dit_jax.models.dit import DiT
    from dit_jax.training.state import TrainState
    from dit_jax.training.step import TrainStep
    from dit_jax.training.validation import Validation


VALIDATED = 64  # records that a device scores at a time, at most: more are not faster


def compute_dtype(name: str, device: jax.Device) -> jnp.dtype:
    """The dtype of the network's arithmetic; ``auto`` is the one that the device is fast at.

    That is float32 on a CPU, bfloat16 on a TPU and on a GPU since Ampere (compute capability 8.0), float16 on an older
    one, which has no bfloat16.
    """
    if device.platform == "cpu":
        fast = jnp.float32
    elif device.platform == "gpu" and _compute_capability(device) < (8, 0):
        fast = jnp.float16
    else:
        fast = jnp.bfloat16
    choices = {"auto": fast, "float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
    return choose("dtype", name, choices)


def decoding_dtype(dtype: Any) -> Any:
    """What pictures are decoded in where the model computes in ``dtype``; float16 would overflow in a VAE.

    In bfloat16, pictures of the embedded VAE are 56 dB from those in float32.
    """
    return jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32


def _compute_capability(device: jax.Device) -> tuple[int, ...]:
    """NVIDIA's version of a GPU's features, e.g. (7, 5) of a T4. Other makers' GPUs have bfloat16 and count as new."""
    capability = getattr(device, "compute_capability", "")
    return tuple(map(int, capability.split("."))) if re.fullmatch(r"\d+\.\d+", capability) else (8, 0)


@contextlib.contextmanager
def config_errors(section: str) -> Iterator[None]:
    """A value that a library refuses was the user's word in this section: say so in one line."""
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise ConfigError(f"{section}: {error}") from error


# ------------------------------------------------------------------------------------------------------ objects


def make_vae(config: ConfigDict) -> "VAE":
    """The frozen VAE, in float32."""
    from dit_jax.encoders import load_vae

    with config_errors("vae"):
        return load_vae(config.vae)


def make_preview_vae(config: ConfigDict, vae: "VAE") -> "VAE":
    """What decodes the sample grids of a run: `preview_vae`, or the VAE itself where none is named.

    Raises:
      ConfigError: it is not for latents of this shape.
    """
    from dit_jax.encoders import load_vae

    if not config.preview_vae:
        return vae
    with config_errors("preview_vae"):
        preview = load_vae(config.preview_vae)
    if preview.shape != vae.shape:
        raise ConfigError(f"preview_vae {preview.name} has {preview.shape}, but {vae.name} has {vae.shape}")
    if not np.array_equal(preview.latent_scale, vae.latent_scale):
        theirs, ours = (float(one.latent_scale.scale[0]) for one in (preview, vae))
        raise ConfigError(
            f"preview_vae {preview.name} is made for latents scaled by {theirs:.5f}, not by {ours:.5f} as those of"
            f" {vae.name}"
        )
    return preview


def make_text_encoder(config: ConfigDict) -> "TextEncoder":
    """The frozen text encoder."""
    from dit_jax.encoders import load_text_encoder

    with config_errors("text_encoder"):
        return load_text_encoder(config.text_encoder)


def describe_encoders(config: ConfigDict) -> tuple["VAEShape", "TextShape"]:
    """What a model must know of the frozen encoders, without their weights."""
    from dit_jax.encoders import TextShape, describe_text_encoder, describe_vae

    model = config.model
    stated = TextShape(model.text_length, model.text_width, model.pooled_width)
    with config_errors("vae"):
        vae = describe_vae(config.vae)
    with config_errors("text_encoder"):
        return vae, describe_text_encoder(config.text_encoder, stated if all(stated) else None)


def make_source(config: ConfigDict, part: Literal["train", "validation", "all"]) -> "Source | Cache":
    """The records to train on (``part="train"``), those set aside (``"validation"``), or both (``"all"``)."""
    from dit_jax.data.sources.catalogue import open_source

    fraction = config.data.validation_fraction
    if not 0.0 <= fraction < 1.0:
        raise ConfigError(f"data.validation_fraction is {fraction}; it must be in [0, 1)")
    return open_source(config.data.source, lambda: make_shapes_world(config), fraction, part)


def make_validation_source(config: ConfigDict) -> "Source | Cache":
    """The records to validate on: at most ``data.validation_records`` of those set aside.

    Raises:
      ConfigError: none are set aside.
    """
    from dit_jax.data.cache.gather import Cache
    from dit_jax.data.sources.records import Subset, first_by_hash

    source = make_source(config, "validation")
    if not len(source):
        raise ConfigError(
            f"data.validation_fraction={config.data.validation_fraction} sets no record of"
            f" data.source={config.data.source} aside to validate on: set a larger one"
        )
    chosen = first_by_hash(source.ids(), len(source), config.data.validation_records)
    return source.select(chosen) if isinstance(source, Cache) else Subset(source, chosen, source.name)


def make_shapes_world(config: ConfigDict) -> "ShapesWorld":
    """The pictures that ``data.source=shapes`` stands for."""
    from dit_jax.data.shapes_world import ShapesWorld

    if config.data.max_objects not in (1, 2, 3):
        raise ConfigError(f"data.max_objects is {config.data.max_objects}; it can be 1, 2, 3")
    objects = tuple(range(1, config.data.max_objects + 1))
    with config_errors("data"):
        return ShapesWorld(config.seed, config.data.num_pictures, objects=objects, combinations="seen")


def choose_flip(config: ConfigDict, source: "Source") -> bool:
    """Whether half of the pictures are mirrored: as told, or where no caption speaks of left and right.

    ``source`` is all of ``data.source``, also what is set aside: a cache holds it too, and must decide alike.
    """
    from dit_jax.data.transforms import captions_speak_of_sides

    all_captions = (caption for captions in source.captions() for caption in captions)
    choices = {"on": lambda: True, "off": lambda: False, "auto": lambda: not captions_speak_of_sides(all_captions)}
    return choose("data.flip", config.data.flip, choices)()


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device]) -> "Mesh":
    """The devices of a run, as they share its work."""
    with config_errors("mesh"):
        return sharding.make_mesh(devices, config.mesh.fsdp, config.mesh.tensor)


def make_model(config: ConfigDict, dtype: jnp.dtype, mesh: "Mesh | None" = None) -> "DiT":
    """The network, unbound; on a mesh for training, without one to draw with."""
    from dit_jax.models.dit import DiT

    with config_errors("model"):
        model = DiT(**config.model, dtype=dtype, mesh=mesh)
    if config.model.num_heads % config.mesh.tensor:
        raise ConfigError(f"mesh.tensor is {config.mesh.tensor}; it must divide model.num_heads {model.num_heads}")
    return model


def describe_state(
    config: ConfigDict, model: "DiT", optimizer: "optax.GradientTransformation", side: int, mesh: "Mesh | AbstractMesh"
) -> "TrainState":
    """The state of a run in shapes alone, as it lies on the mesh; ``side`` is that of the latents."""
    from dit_jax.training.state import abstract_state

    with config_errors(f"mesh.fsdp={config.mesh.fsdp}, mesh.tensor={config.mesh.tensor}"):
        return abstract_state(model, optimizer, side, side, mesh)


def make_process(config: ConfigDict) -> "Process":
    """The forward process and the meaning of the prediction."""
    from dit_jax.diffusion.process import Process
    from dit_jax.diffusion.schedules import make_schedule

    with config_errors("diffusion"):
        schedule = make_schedule(config.diffusion.schedule, config.diffusion.shift)
        return Process(schedule, config.diffusion.prediction)


def make_step(
    config: ConfigDict,
    model: "DiT",
    process: "Process",
    optimizer: "optax.GradientTransformation",
    learning_rate: "optax.Schedule",
    to_model_latents: "Callable[[Array], Array] | None" = None,
) -> "TrainStep":
    """One train step of a resolved config; ``to_model_latents`` is that of its latents, unless it is given."""
    from dit_jax.training.step import TrainStep

    return TrainStep(
        model=model,
        process=process,
        sample_times=make_times(config, process),
        weight=make_weight(config, process),
        variance_weight=config.diffusion.variance_weight,
        to_model_latents=to_model_latents or make_latents(config).to_model,
        optimizer=optimizer,
        learning_rate=learning_rate,
        caption_dropout=config.caption_dropout,
        ema_decay=config.ema_decay,
        accumulate=config.accumulate,
        seed=config.seed,
    )


def make_validation(
    config: ConfigDict, model: "DiT", process: "Process", records: "Cache", mesh: "Mesh"
) -> "Validation":
    """What scores parameters on encoded records; it takes no more memory than a train step of the same config."""
    from dit_jax.training.validation import Validation

    shards = sharding.batch_shards(mesh)
    of_shard = config.batch_size // (config.accumulate * shards)  # as many as training has at a time
    batch_size = min(max(of_shard, 1), VALIDATED) * shards
    return Validation(model, process, make_latents(config).to_model, records, batch_size, mesh)


def make_shapes(config: ConfigDict, factor: int) -> tuple[tuple[int, int], ...]:
    """(height, width) of the pictures of every bucket; ``factor`` is that of the VAE."""
    from dit_jax.data import buckets

    size = config.data.image_size
    if not config.data.buckets:
        return ((size, size),)
    with config_errors("data.buckets"):
        return buckets.shapes(size, factor * config.model.patch_size, config.data.buckets)


def make_order(config: ConfigDict, source: "Source | Cache", bucket: np.ndarray) -> "Order":
    """Which record each sample of the run is; ``bucket`` is that of every record."""
    from dit_jax.data import order
    from dit_jax.data.sources.records import parts_of

    return order.make_order(parts_of(source), bucket, config.batch_size, config.seed)


def make_samples(
    config: ConfigDict, source: "Source", order: "Order", shapes: tuple[tuple[int, int], ...]
) -> "Samples":
    """The run's sequence of samples."""
    from dit_jax.data.loader import Samples

    random_crop = config.data.crop == "random"
    looked_at = config.data.flip == "auto" and config.data.validation_fraction
    flip = choose_flip(config, cast("Source", make_source(config, "all")) if looked_at else source)
    return Samples(source, order, config.seed, shapes, random_crop=random_crop, flip=flip)


def make_bad_records(config: ConfigDict, path: Path | None, num_records: int) -> "BadRecords":
    """The list of records that cannot be read."""
    from dit_jax.data.bad_records import BadRecords

    with config_errors("data"):
        return BadRecords(path, config.data.max_bad_fraction, num_records)


def make_identity(
    config: ConfigDict,
    name: str,
    fingerprint: str,
    counts: dict[str, Any],
    shapes: tuple[tuple[int, int], ...],
    mirrored: bool,
    vae: "VAE",
    text_encoder: "TextEncoder",
    per_shard: int,
) -> "Identity":
    """What a cache says of itself: what it was made from, and how.

    Args:
      config: of the run.
      name, fingerprint: of the source.
      counts: of its records and captions (`dit_jax.data.cache.parts.Table.counts`).
      shapes: of the pictures of every bucket.
      mirrored: whether mirror images are kept too.
      vae, text_encoder: what encodes.
      per_shard: records, or captions, in a shard.
    """
    from dit_jax.data.cache.files import FORMAT

    return {
        "format": FORMAT,
        "data": {"name": name, "fingerprint": fingerprint, **counts},
        "image_size": config.data.image_size,
        "crop": config.data.crop,
        "mirrored": mirrored,
        "buckets": [list(shape) for shape in shapes],
        "vae": {
            "name": vae.name,
            "sha256": vae.sha256,
            "shift": vae.latent_scale.shift.tolist(),
            "scale": vae.latent_scale.scale.tolist(),
            "factor": vae.shape.factor,
            "channels": vae.shape.channels,
        },
        "text_encoder": {
            "name": text_encoder.name,
            "sha256": text_encoder.sha256,
            "length": text_encoder.length,
            "width": text_encoder.width,
            "pooled_width": text_encoder.pooled_width,
        },
        "storage_dtype": config.data.storage_dtype,
        "records_per_shard": per_shard,
        "captions_per_shard": per_shard,
    }


def make_times(config: ConfigDict, process: "Process") -> "Times":
    """At which times a network is trained."""
    from dit_jax.diffusion import objectives

    d = config.diffusion
    choices = {
        "uniform": lambda: objectives.uniform(process.schedule),
        "stratified": lambda: objectives.stratified(process.schedule, config.batch_size),
        "logit_normal": lambda: objectives.logit_normal(process.schedule, d.logit_mean, d.logit_std),
        "log_normal": lambda: objectives.log_normal(process.schedule, d.noise_mean, d.noise_std),
    }
    with config_errors("diffusion"):
        return choose("diffusion.times", d.times, choices)()


def make_weight(config: ConfigDict, process: "Process") -> "Weight | None":
    """How much the loss at a time counts; None where all times count alike."""
    from dit_jax.diffusion import objectives

    d = config.diffusion
    choices = {
        "uniform": lambda: None,
        "min_snr": lambda: objectives.min_snr(process, d.min_snr_gamma),
        "sigmoid": lambda: objectives.sigmoid(process, d.sigmoid_bias),
    }
    with config_errors("diffusion"):
        return choose("diffusion.weighting", d.weighting, choices)()


def make_latents(config: ConfigDict) -> "LatentScale":
    """The map between raw and model latents that a resolved config states."""
    from dit_jax.encoders.latents import LatentScale

    return LatentScale(np.asarray(config.latents.shift, np.float32), np.asarray(config.latents.scale, np.float32))


def make_grid(config: ConfigDict, process: "Process") -> np.ndarray:
    """The times of a sampling run, ``[steps + 1]``."""
    from dit_jax.diffusion import grids

    s = config.sample
    with config_errors("sample"):
        return grids.make_grid(s.grid, process.schedule, s.steps, s.grid_shift, s.grid_rho)


def make_sampler(config: ConfigDict, process: "Process", grid: np.ndarray) -> "Sampler":
    """The sampler, for a process and a time grid ``[steps + 1]``."""
    from dit_jax.diffusion import samplers

    choices = {
        "ddpm": lambda: samplers.ddpm(process, grid),
        "ddim": lambda: samplers.ddim(process, grid, config.sample.eta),
        "dpmpp_2m": lambda: samplers.dpmpp_2m(process, grid),
        "euler": lambda: samplers.euler(process, grid),
        "euler_ancestral": lambda: samplers.euler_ancestral(process, grid),
        "heun": lambda: samplers.heun(process, grid),
    }
    with config_errors("sample"):
        return choose("sampler", config.sample.sampler, choices)()


def make_correction(config: ConfigDict) -> "Correction":
    """What tames guidance."""
    from dit_jax.diffusion.guidance import Correction

    return Correction(config.sample.guidance_rescale, config.sample.apg_parallel, config.sample.apg_norm)


def make_optimizer(config: ConfigDict) -> tuple["optax.GradientTransformation", "optax.Schedule"]:
    """The optimizer and its learning-rate schedule."""
    from dit_jax.training import optimizer

    with config_errors("optimizer"):
        schedule = optimizer.learning_rate_schedule(
            config.learning_rate_schedule, config.learning_rate, config.warmup_steps, config.total_steps
        )
        made = optimizer.make_optimizer(
            config.optimizer,
            config.adam_b1,
            config.adam_b2,
            config.muon_momentum,
            config.weight_decay,
            config.clip_norm,
            config.moment_dtype,
        )
    return made, schedule
