"""What a new run begins with: the parameters of another run, of an export, or of a file of PyTorch.

init_from=RUN_OR_EXPORT         its average; its scale of latents goes with it, other encoders are refused
init_from=FILE.safetensors      a DiT in a layout of `dit_jax.exchange.layouts`; the file says nothing else
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from dit_jax import stores
from dit_jax.encoders.weights import PICKLE_SUFFIXES
from dit_jax.errors import ConfigError
from dit_jax.exchange import layouts
from dit_jax.files import flatten
from dit_jax.stored import ENCODERS, Stored, open_stored
from dit_jax.training.init_from import transfer
from dit_jax.training.state import TrainState
from dit_jax.trees import named_leaves

Say = Callable[[str], None]

# Keys that change what parameters mean, but not their shapes.
MEANINGS = (
    "diffusion.schedule",
    "diffusion.shift",
    "diffusion.prediction",
    "model.num_heads",
    "model.attention_head_dim",
    "model.time_scale",
    "model.text_pool",
    "model.mlp",
    "model.norm",
    "model.positions",
    "model.rope",
    "model.base_grid",
)


def begin_from(config: ConfigDict, identity: Mapping[str, str], state: TrainState, factor: int, say: Say) -> TrainState:
    """A fresh state with the parameters of ``init_from`` where they fit, and a word on every one that does not.

    Args:
      config: of the new run; takes the scale of latents over where ``init_from`` has one.
      identity: sha256 of its data and encoders.
      state: as it begins by itself.
      factor: of the VAE.
      say: prints a line.

    Raises:
      CheckpointError: there is nothing there, or it is damaged.
      ConfigError: it was trained with other encoders, or nothing of it fits.
    """
    path = stores.folder_of(config.init_from)
    if path.suffix in PICKLE_SUFFIXES:
        raise ConfigError(
            f"init_from={path} is a pickle, which can run code and is not read; convert it where torch is installed:"
            " safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')"
        )
    if path.suffix == ".safetensors":
        return _begin_from_file(path, config, state, say)
    origin = _open_origin(config, identity, say)
    trained = origin.trained
    whole = origin.restore(factor, state.step.sharding)  # on every device, as the step
    return _fill(state, whole, f"{origin.folder}, {trained.parameters} parameters of step {trained.step}", [], say)


def _open_origin(config: ConfigDict, identity: Mapping[str, str], say: Say) -> Stored:
    """The model that ``init_from`` names, once its encoders are seen to be ours; its scale of latents becomes ours."""
    origin = open_stored(config.init_from, None, None)
    other = [name for name in ENCODERS if getattr(origin.trained, name) != identity[name]]
    if other:
        named = ", ".join(f"{name} {origin.config[name]}" for name in other)
        raise ConfigError(
            f"init_from={config.init_from} was trained with another {' and '.join(other)} (its own: {named}); its"
            " parameters mean nothing to these latents and states"
        )
    theirs, ours = flatten(origin.config), flatten(config)
    for key in MEANINGS:
        if theirs.get(key) != ours[key]:
            say(f"warning: init_from was trained with {key}={theirs.get(key)}, this run has {ours[key]}")
    own = origin.config.latents.shift, origin.config.latents.scale
    if config.latents.scale and (config.latents.shift, config.latents.scale) != own:
        raise ConfigError(
            f"init_from={config.init_from} was trained with latents.shift {own[0]} and latents.scale {own[1]}, this run"
            f" has {config.latents.shift} and {config.latents.scale}; leave both empty, and they are taken over"
        )
    config.latents.shift, config.latents.scale = own
    return origin


def _begin_from_file(path: Path, config: ConfigDict, state: TrainState, say: Say) -> TrainState:
    if stores.in_bucket(path):
        raise ConfigError(f"init_from={path} lies in a bucket: fetch it first (gcloud storage cp {path} .)")
    if not path.is_file():
        raise ConfigError(f"init_from: there is no file {path}")
    found = layouts.read_parameters(path)
    ours, wanted = flatten(config), named_leaves(state.params)
    say(
        f"warning: init_from={path} does not say what it was trained with; this run has vae={config.vae},"
        f" text_encoder={config.text_encoder}, latents.normalize={config.latents.normalize},"
        f" diffusion.schedule={config.diffusion.schedule}, diffusion.prediction={config.diffusion.prediction}"
    )
    notes = [f"no counterpart: {name}" for name in found.strangers]
    if found.layout == "reference":
        for key, meant in layouts.REFERENCE_MEANINGS.items():
            if ours[key] != meant:
                say(f"warning: init_from is for {key}={meant}, this run has {ours[key]}")
        if ours["diffusion.schedule"] != "rectified_flow":
            say("warning: init_from counts its 1000 steps from 0, this run from 1: times are off by one of them")
    leaves = {}
    for name, leaf in found.leaves.items():
        leaf = np.asarray(leaf, np.float32)
        if name in wanted:
            if name.startswith("final_layer/linear/") and leaf.shape[-1] == 2 * wanted[name].shape[-1]:
                leaf = layouts.without_variance(leaf, config.model.patch_size)
                notes.append(f"dropped: channels of a learned variance in {name}")
            leaf = layouts.reshaped(leaf, wanted[name])
        leaves[name] = leaf
    tree = traverse_util.unflatten_dict(leaves, sep="/")
    return _fill(state, tree, f"{path}, in the layout of {found.layout}", notes, say)


def _fill(state: TrainState, params: Any, named: str, notes: Sequence[str], say: Say) -> TrainState:
    found = transfer(params, state.params)
    say(f"init_from: {named}: {len(found.taken)} of {len(jax.tree.leaves(state.params))} taken over")
    for kind in ("resampled", "new", "dropped", "misshapen"):
        for name in getattr(found, kind):
            say(f"init_from: {kind}: {name}")
    for note in notes:
        say(f"init_from: {note}")
    if not found.taken:
        raise ConfigError(f"nothing of init_from={named} fits this model")
    return replace(state, params=found.params, ema=jax.tree.map(jnp.copy, found.params))
