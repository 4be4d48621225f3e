"""What a run is made of: all that its config names, gathered and checked before anything is written."""

import contextlib
import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

import dit_jax
from dit_jax import build
from dit_jax.data.cache.gather import Cache
from dit_jax.data.sources.records import Source
from dit_jax.diffusion.process import Process
from dit_jax.encoders import VAE, TextEncoder
from dit_jax.errors import ConfigError, FetchError
from dit_jax.models.dit import DiT
from dit_jax.resolve import resolve
from dit_jax.runtime import DETERMINISTIC, git_commit
from dit_jax.sharding import batch_shards
from dit_jax.training.state import TrainState
from dit_jax.workdir import Workdir

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint")  # whose versions are told and saved


class Parts(NamedTuple):
    """What a run is made of, before anything of it is written."""

    config: ConfigDict  # resolved
    workdir: Workdir
    mesh: Mesh
    source: Source | Cache
    held_out: Source | Cache | None  # the records to validate on
    vae: VAE
    preview: VAE
    text_encoder: TextEncoder
    model: DiT
    process: Process
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    shapes: TrainState  # of the state, with shardings
    identity: dict[str, str]  # hashes of what a run may not change
    notes: list[str]  # warnings

    @property
    def side(self) -> int:
        """Of the latents of a square picture."""
        return self.config.data.image_size // self.vae.factor


def gather(config: ConfigDict, workdir: Workdir) -> Parts:
    """What there is to train with; the config is resolved in place, and nothing is written.

    Raises:
      ConfigError, DataError, FetchError: as of `dit_jax.train.run`.
    """
    mesh = build.make_mesh(config, jax.devices())
    source = build.make_source(config, "train")  # first: a folder that is not there must cost no download
    with offer_embedded():
        vae, text_encoder = build.make_vae(config), build.make_text_encoder(config)
    preview = build.make_preview_vae(config, vae)
    notes = resolve(config, len(source), vae.shape, text_encoder.shape, batch_shards(mesh))
    held_out = build.make_validation_source(config) if config.validate_every else None
    model = build.make_model(config, build.compute_dtype(config.dtype, jax.devices()[0]), mesh)
    process = build.make_process(config)
    build.make_times(config, process)  # needed later: what cannot be is refused before anything is written
    build.make_weight(config, process)
    build.make_sampler(config, process, build.make_grid(config, process))
    optimizer, learning_rate = build.make_optimizer(config)
    if config.deterministic and jax.default_backend() == "gpu" and DETERMINISTIC not in os.environ.get("XLA_FLAGS", ""):
        notes.append(f"deterministic came too late for XLA: set XLA_FLAGS={DETERMINISTIC} before JAX is imported")
    identity = {"data": source.fingerprint(), "vae": vae.sha256, "text_encoder": text_encoder.sha256}
    return Parts(
        config=config,
        workdir=workdir,
        mesh=mesh,
        source=source,
        held_out=held_out,
        vae=vae,
        preview=preview,
        text_encoder=text_encoder,
        model=model,
        process=process,
        optimizer=optimizer,
        learning_rate=learning_rate,
        shapes=build.describe_state(config, model, optimizer, config.data.image_size // vae.factor, mesh),
        identity=identity,
        notes=notes,
    )


@contextlib.contextmanager
def offer_embedded() -> Iterator[None]:
    """Where encoders cannot be fetched, a new run has others to choose."""
    try:
        yield
    except FetchError as error:
        raise FetchError(
            f"{error}; the encoders that need no network: --config.vae=embedded --config.text_encoder=embedded"
        ) from error


def describe(parts: Parts, parameters: int) -> dict[str, Any]:
    """What a checkpoint says of itself beside its arrays, of which so many numbers are ``parameters``."""
    versions = {name: version(name) for name in PACKAGES} | {"dit_jax": dit_jax.__version__, "git": git_commit()}
    return {
        **parts.identity,
        "config": parts.config.to_dict(),
        "versions": versions,
        "python": platform.python_version(),
        "devices": f"{parts.mesh.size} x {jax.devices()[0].device_kind}",
        "mesh": dict(parts.mesh.shape),
        "parameters": parameters,
    }


def refuse_another(saved: dict[str, str], found: dict[str, str]) -> None:
    """Raises ConfigError if a run would go on with other data or encoders than it began with."""
    changed = [name for name in found if saved.get(name) != found[name]]
    if changed:
        raise ConfigError(
            f"the run was begun with another {' and '.join(changed)} (compared by hash);"
            " name its own again or put the files back, or begin a new run in another --workdir"
        )
