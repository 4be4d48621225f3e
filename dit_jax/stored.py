"""Trained models on disk: what a run or an export says of itself, and how its parameters are read.

    run      config.json  checkpoints/<step>/...
    export   config.json  model.safetensors (or orbax/)  [vae/]  [text_encoder/]
             config.json  transformer/diffusion_pytorch_model.safetensors  vae/  text_encoder/  tokenizer/ ...

An export's ``config.json`` is that of its run with one section more, ``trained``: the step, which parameters, and the
hashes of data and encoders. The encoders that it was trained with lie in it, or ``vae`` and ``text_encoder`` name them.
"""

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from dit_jax import build, files, stores
from dit_jax.config import TRAINED, read_run
from dit_jax.encoders import places
from dit_jax.errors import CheckpointError, ConfigError
from dit_jax.exchange import layouts
from dit_jax.exchange.components import PARAMETERS
from dit_jax.sharding import make_mesh, replicated, with_sharding
from dit_jax.training.checkpoint import restore_tree, restore_trees, save_tree
from dit_jax.training.formats import in_parts, side_by_side
from dit_jax.training.saved_steps import find_step, restore_metadata
from dit_jax.training.state import abstract_params
from dit_jax.trees import mismatches, named_leaves
from dit_jax.workdir import CHECKPOINTS

ITEM = {"ema": "ema", "raw": "params"}  # of a checkpoint, for every choice of parameters
SAFETENSORS, ORBAX = "model.safetensors", "orbax"
ENCODERS = ("vae", "text_encoder")


@dataclass(frozen=True)
class Trained:
    """What a set of parameters came from.

    Attributes:
      step: after which step of training they were taken.
      parameters: ``ema`` (averaged) or ``raw`` (last).
      data: fingerprint of the records that they were trained on.
      vae, text_encoder: sha256 of the encoders.
    """

    step: int
    parameters: str
    data: str
    vae: str
    text_encoder: str


@dataclass(frozen=True)
class Stored:
    """A trained model on disk, its arrays not read yet; `open_stored` finds one.

    Attributes:
      folder: where it lies.
      config: the resolved config of its run.
      trained: what its parameters came from.
      exported: whether it is an export, and not a run.
    """

    folder: Path
    config: ConfigDict
    trained: Trained
    exported: bool

    def encoder_config(self) -> ConfigDict:
        """The config with the encoders that were copied into the folder in place of those that it names."""
        config = self.config.copy_and_resolve_references()
        for name in ENCODERS:
            if (self.folder / name).is_dir():
                config[name] = str(self.folder / name)
        return config

    def check_encoders(self, found: Mapping[str, str]) -> None:
        """Raises CheckpointError if an encoder is another one than in training; ``found`` has their sha256."""
        for name in ENCODERS:
            saved = getattr(self.trained, name)
            if saved != found[name]:
                raise CheckpointError(
                    f"{self.folder} was trained with another {name} than {self.encoder_config()[name]} (sha256"
                    f" {saved[:12]}, here {found[name][:12]}); put the files back"
                )

    def restore(self, factor: int, sharding: Sharding | None = None) -> Any:
        """The parameters, float32.

        Args:
          factor: f of the VAE: with the picture size it says how large the table of positions is.
          sharding: where every leaf shall lie; None is the first device.

        Raises:
          CheckpointError: they are unreadable, or those of another model.
        """
        shapes = parameter_shapes(self.config, factor)
        shapes = with_sharding(shapes, sharding or replicated(make_mesh(jax.devices()[:1])))
        if not self.exported:
            item = ITEM[self.trained.parameters]
            with _without_warnings():
                return restore_trees(self.folder / CHECKPOINTS, self.trained.step, {item: shapes})[item]
        flat = side_by_side(shapes)
        if (self.folder / SAFETENSORS).is_file():
            return in_parts(_read_safetensors(self.folder / SAFETENSORS, flat), shapes)
        if (self.folder / PARAMETERS).is_file():
            return in_parts(_read_safetensors(self.folder / PARAMETERS, flat), shapes)
        if (self.folder / ORBAX).is_dir():
            with _without_warnings():
                return in_parts(restore_tree(self.folder / ORBAX, flat), shapes)
        raise CheckpointError(f"no parameters in {self.folder}: there is no {SAFETENSORS}, {ORBAX}/ or {PARAMETERS}")


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Orbax warns that a part of a step has no metadata of its own: those of the step are a folder above. Programs mute
    it (`dit_jax.runtime`); who loads a model in Python has called none.
    """
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(level)


def open_stored(path: str | Path, parameters: str | None, step: int | None) -> Stored:
    """Find a trained model in the folder of a run or an export.

    Args:
      path: the folder, or the hub id of an export.
      parameters: ``ema`` or ``raw``; None takes what an export holds, and ``ema`` of a run.
      step: which checkpoint; None takes the newest, or the one that was exported.

    Raises:
      CheckpointError: there is none, not this one, or what it says of itself is damaged.
      ConfigError: ``parameters`` is neither, or the path is nearly a hub id.
      FetchError: it is not to be had from the hub.
    """
    if parameters not in (None, *ITEM):
        raise ConfigError(f"ema is {parameters!r}; it can be {', '.join(ITEM)}")
    folder = stores.folder_of(str(path))
    if places.is_hub_id(path):
        from dit_jax.encoders import hub  # its library takes a second to import

        try:
            folder = hub.fetch(str(path), "model")
        except ValueError as error:
            raise ConfigError(str(error)) from error
    elif not folder.is_dir() and (reason := places.hidden_by(path)):
        raise CheckpointError(f"there is no folder {folder}{reason}")
    stores.reach(folder)
    config = read_run(folder)
    trained = _read_trained(folder / "config.json")
    if trained is None:
        parameters = parameters or "ema"
        return Stored(folder, config, _verified(folder / CHECKPOINTS, step, parameters, config), exported=False)
    if stores.in_bucket(folder):
        raise CheckpointError(f"{folder} is an export: fetch it first (gcloud storage cp -r {folder} .)")
    for asked, held in ((parameters, trained.parameters), (step, trained.step)):
        if asked not in (None, held):
            raise CheckpointError(
                f"{folder} is an export of the {trained.parameters} parameters of step {trained.step};"
                f" {asked} is only in the run that it came from"
            )
    return Stored(folder, config, trained, exported=True)


def write_stored(folder: Path, config: ConfigDict, trained: Trained, params: Any, form: str, dtype: DTypeLike) -> None:
    """Write parameters and what they came from as an export, without its other parts.

    Args:
      folder: an empty folder.
      config: of the run.
      trained: what they came from.
      params: the parameters.
      form: of `dit_jax.config.FORMATS`; ``orbax`` restores on any number and kind of devices.
      dtype: float32 or bfloat16, of the numbers on disk.
    """
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), side_by_side(params))
    if form == "orbax":
        save_tree(folder / ORBAX, params)
    else:
        leaves = {name: np.ascontiguousarray(leaf) for name, leaf in named_leaves(jax.device_get(params)).items()}
        if form == "diffusers":
            (folder / PARAMETERS).parent.mkdir()
            save_file(layouts.to_torch(leaves), folder / PARAMETERS, metadata={"format": "pt"})
        else:
            save_file(leaves, folder / SAFETENSORS, metadata={"format": "dit_jax"})
    text = json.dumps(config.to_dict() | {TRAINED: asdict(trained)}, indent=2)
    (folder / "config.json").write_text(text + "\n")


def parameter_shapes(config: ConfigDict, factor: int) -> Any:
    """Shapes and types of the parameters of a resolved config; ``factor`` is that of the VAE."""
    model, side = build.make_model(config, jnp.float32), config.data.image_size // factor
    return abstract_params(model, side, side)


def _verified(directory: Path, step: int | None, parameters: str, config: ConfigDict) -> Trained:
    """What a run says of its parameters at a step, or at the newest that is not damaged: with a warning, and the
    damaged ones stay where they are, as only training writes there.
    """
    report, damaged = find_step(directory, step, config.verify_checkpoints, (ITEM[parameters], "metadata"))
    for one in damaged:
        warnings.warn(f"{directory}: {one}; step {report.step} is used", stacklevel=3)
    if not report.verifiable:
        warnings.warn(f"{directory}: {report}", stacklevel=3)
    metadata = restore_metadata(directory, report.step)
    if not all(isinstance(metadata.get(name), str) for name in ("data", *ENCODERS)):
        raise CheckpointError(f"{directory}: step {report.step} does not say what its parameters came from")
    return Trained(report.step, parameters, **{name: metadata[name] for name in ("data", *ENCODERS)})


def _read_trained(path: Path) -> Trained | None:
    """What an export says of its parameters; None of a run, which says it in every checkpoint."""
    found = files.read_json(path).get(TRAINED)
    if found is None:
        return None
    kinds: dict[str, Any] = {field.name: field.type for field in fields(Trained)}
    if not isinstance(found, dict) or {name: type(value) for name, value in found.items()} != kinds:
        should = ", ".join(f"{name} ({kind.__name__})" for name, kind in kinds.items())
        raise CheckpointError(f"{path} is damaged: its section {TRAINED!r} should hold {should}")
    if (named := found["parameters"]) not in ITEM:
        raise CheckpointError(f"{path} is damaged: its parameters are {named!a:.50}, and can be {', '.join(ITEM)}")
    return Trained(**found)


def _read_safetensors(path: Path, shapes: Any) -> Any:
    """The tensors of a file in the tree of ``shapes``, cast to its types and put where it says."""
    expected = named_leaves(shapes)
    found = layouts.read_parameters(path).leaves
    if wrong := mismatches({name: leaf.shape for name, leaf in found.items()}, expected):
        raise CheckpointError(f"{path} does not fit its config.json: {'; '.join(wrong)}")
    leaves = [jax.device_put(found[name].astype(leaf.dtype), leaf.sharding) for name, leaf in expected.items()]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)
