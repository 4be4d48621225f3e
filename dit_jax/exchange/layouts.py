"""Names and axes of a DiT's parameters in files of safetensors.

    dit_jax      blocks_0/attention/qkv/kernel [in, out]    as exports have them
    torch        blocks_0.attention.qkv.weight [out, in]    as ``assets/torch/dit.py`` has them
    reference    blocks.0.attn.qkv.weight [out, in]         as facebookresearch/DiT has them (Peebles & Xie 2023)

The second follows from the first by one rule, and back; the third is only read, by a table. Its block is that of
``modulation=adaln_zero`` with ``mlp=gelu``. What it has and we have not is told by name.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dit_jax.encoders.weights import read_tensors
from dit_jax.errors import CheckpointError, ConfigError

Leaves = dict[str, np.ndarray]  # by our names

# A layer of the reference -> ours; both have a weight or kernel, and a bias.
REFERENCE = (
    (r"x_embedder\.proj", r"x_embedder/proj"),
    (r"t_embedder\.mlp\.0", r"t_embedder/mlp_in"),
    (r"t_embedder\.mlp\.2", r"t_embedder/mlp_out"),
    (r"blocks\.(\d+)\.attn\.qkv", r"blocks_\1/attention/qkv"),
    (r"blocks\.(\d+)\.attn\.proj", r"blocks_\1/attention/out"),
    (r"blocks\.(\d+)\.mlp\.fc1", r"blocks_\1/mlp/fc_in"),
    (r"blocks\.(\d+)\.mlp\.fc2", r"blocks_\1/mlp/fc_out"),
    (r"blocks\.(\d+)\.adaLN_modulation\.1", r"blocks_\1/adaln/proj"),
    (r"final_layer\.linear", r"final_layer/linear"),
    (r"final_layer\.adaLN_modulation\.1", r"final_layer/adaln/proj"),
)
# What its parameters were trained for, by keys of the config; other values give them another meaning.
REFERENCE_MEANINGS = {
    "diffusion.schedule": "linear",
    "diffusion.prediction": "epsilon",
    "model.mlp": "gelu",
    "model.norm": "layer",
    "model.qk_norm": False,
    "model.rope": False,
    "model.time_scale": 1000.0,
}
WITHOUT_COUNTERPART = {"y_embedder.embedding_table.weight": "a table of classes, and this model reads text"}
POSITIONS = "pos_embed"  # [1, N, D], of a square grid


class Parameters(NamedTuple):
    """What a file holds.

    Attributes:
      layout: ``dit_jax``, ``torch`` or ``reference``.
      leaves: its parameters by our names and with our axes, maps that are fused side by side.
      strangers: names of what has no counterpart, with the reason where it is known.
    """

    layout: str
    leaves: Leaves
    strangers: list[str]


def to_torch(leaves: Mapping[str, np.ndarray]) -> Leaves:
    """Parameters by the names and with the axes of ``assets/torch/dit.py``."""
    named = {}
    for name, leaf in leaves.items():
        path = name.replace("/", ".")
        if path.endswith(".kernel"):
            path, leaf = path.removesuffix("kernel") + "weight", leaf.T
        named[path] = np.ascontiguousarray(leaf)
    return named


def read_parameters(path: Path) -> Parameters:
    """Read a file of any of the three layouts.

    Raises:
      CheckpointError: the file is damaged, or of numbers that are not read.
      ConfigError: it holds no DiT of a known layout.
    """
    try:
        tensors = read_tensors([path])
    except ValueError as error:
        raise CheckpointError(f"{path.parent}: {error}") from error
    layout = _layout_of(tensors)
    if layout == "reference":
        return _from_reference(tensors)
    if layout == "torch":
        return Parameters(layout, _from_torch(tensors), [])
    if layout == "dit_jax":
        return Parameters(layout, tensors, [])
    first = ", ".join(sorted(tensors)[:3]) or "nothing"
    raise ConfigError(
        f"{path} holds no DiT of a known layout (dit_jax, torch or reference): it begins with {first[:200]}"
    )


def without_variance(leaf: np.ndarray, patch_size: int) -> np.ndarray:
    """The last layer's ``[..., p * p * 2 C]`` without the C channels of a learned variance: ``[..., p * p * C]``."""
    apart = leaf.reshape(*leaf.shape[:-1], patch_size**2, 2, -1)
    return apart[..., 0, :].reshape(*leaf.shape[:-1], -1)


def _layout_of(names: Iterable[str]) -> str | None:
    """By the layer that every layout has."""
    names = set(names)
    marks = {"t_embedder/mlp_in/kernel": "dit_jax", "t_embedder.mlp_in.weight": "torch",
             "t_embedder.mlp.0.weight": "reference"}  # fmt: skip
    return next((layout for mark, layout in marks.items() if mark in names), None)


def _from_torch(tensors: Mapping[str, np.ndarray]) -> Leaves:
    leaves = {}
    for name, tensor in tensors.items():
        path = name.replace(".", "/")
        if path.endswith("/weight"):
            path, tensor = path.removesuffix("weight") + "kernel", tensor.T
        leaves[path] = tensor
    return leaves


def _from_reference(tensors: Mapping[str, np.ndarray]) -> Parameters:
    leaves: Leaves = {}
    strangers = []
    for name, tensor in sorted(tensors.items()):
        layer, _, kind = name.rpartition(".")
        ours = _layer_of_ours(layer) if kind in ("weight", "bias") else None
        side = int(tensor.shape[1] ** 0.5) if name == POSITIONS and tensor.ndim == 3 else 0
        if side and side**2 == tensor.shape[1]:
            leaves["pos_embed/table"] = tensor.reshape(side, side, -1)
        elif ours is None:
            reason = WITHOUT_COUNTERPART.get(name)
            strangers.append(f"{name} {tensor.shape}" + (f" ({reason})" if reason else ""))
        else:
            leaves[f"{ours}/{'kernel' if kind == 'weight' else kind}"] = _with_our_axes(tensor)
    return Parameters("reference", leaves, strangers)


def _layer_of_ours(layer: str) -> str | None:
    for pattern, ours in REFERENCE:
        if found := re.fullmatch(pattern, layer):
            return found.expand(ours)
    return None


def _with_our_axes(tensor: np.ndarray) -> np.ndarray:
    """A weight ``[out, in]``, or of the patches' convolution ``[D, C, p, p]``, as a kernel ``[in, out]``."""
    if tensor.ndim == 4:
        return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])
    return tensor.T


def reshaped(leaf: Any, wanted: Any) -> Any:
    """A map that lies side by side in a file, ``[D, parts * features]``, with the axis of its parts where a model has
    one: ``[D, parts, features]``.
    """
    if leaf.ndim + 1 != wanted.ndim or leaf.shape[-1] % wanted.shape[-2]:
        return leaf
    return leaf.reshape(*leaf.shape[:-1], wanted.shape[-2], -1)
