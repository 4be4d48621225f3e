"""Published weights: safetensors or Flax msgpack of a folder, and how their names and layouts become a linen tree.

Our modules carry the published names, so one rule translates, in both directions:

    linen                                         published (from torch)
    encoder/layers_0/mlp/fc1/kernel [in, out]     text_model.encoder.layers.0.mlp.fc1.weight [out, in]
    encoder/conv_in/kernel [y, x, in, out]        encoder.conv_in.weight [out, in, y, x]
    .../scale, .../embedding                      ... .weight
    .../bias, and parameters without a layer      the same name

Files of Flax hold linen trees of nearly these names. They are read by turning them into published tensors
with the same rule, so that one check serves both. A tree is checked by name and shape before anything runs:
nothing is initialised at random in silence.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import serialization, traverse_util
from safetensors import SafetensorError, safe_open

from dit_jax import files

Tree = dict[str, Any]

TEXT_PREFIX, VISION_PREFIX, VAE_PREFIX = "text_model.", "vision_model.", ""
# Parameters that stand beside the towers in published files, and so never carry a tower's prefix.
UNPREFIXED = ("text_projection", "visual_projection", "logit_scale")

# Tensors that published files may hold beyond what a network needs, by the prefix of the network.
KNOWN_EXTRAS = {
    TEXT_PREFIX: (
        r"text_model\.embeddings\.position_ids",
        r"text_projection\.weight",
        r"visual_projection\.weight",
        r"logit_scale",
        r"vision_model\..*",
    ),
    VISION_PREFIX: (
        r"vision_model\.embeddings\.position_ids",
        r"text_projection\.weight",
        r"visual_projection\.weight",
        r"logit_scale",
        r"text_model\..*",
    ),
    VAE_PREFIX: (),
}

# Older spellings of the VAE's attention (diffusers before 0.17), which most published files still have.
RENAMED = (
    (r"(mid_block\.attentions\.0)\.query\.", r"\1.to_q."),
    (r"(mid_block\.attentions\.0)\.key\.", r"\1.to_k."),
    (r"(mid_block\.attentions\.0)\.value\.", r"\1.to_v."),
    (r"(mid_block\.attentions\.0)\.proj_attn\.", r"\1.to_out.0."),
)

PLAIN_STEMS = ("model", "diffusion_pytorch_model", "flax_model", "diffusion_flax_model")
SHARD = re.compile(r"-\d+-of-\d+\.")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file of a published folder holds.

    Raises:
      ValueError: the file holds no JSON, or something else than an object.
    """
    try:
        found = files.read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(found).__name__}, not an object")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights, by the rule of `choose`.

    Raises:
      FileNotFoundError, ValueError: as of ``choose``.
    """
    names = {path.name for path in folder.iterdir() if path.is_file()}
    return [folder / name for name in choose(names, folder.joinpath, str(folder))]


def choose(names: set[str], open_file: Callable[[str], Path], where: str) -> list[str]:
    """Of the names in a folder, here or on a hub, those of one set of weights.

    Safetensors go before msgpack, then a plain file before an index with its shards before any other single file:
    folders often carry a copy in half precision (model.fp16.safetensors) beside the plain file.

    Args:
      names: of the files that lie directly in the folder.
      open_file: gives the local file of one of them; used for an index.
      where: the folder, in words for a person.

    Returns:
      A single file, or an index and the shards that it names.

    Raises:
      FileNotFoundError: there is no set, or a shard or the index of the shards is absent.
      ValueError: only pickles are there, which can run code and are not read, or several sets of weights, or a
        damaged index.
    """
    for suffix in READERS:
        single = sorted(name for name in names if name.endswith(suffix) and not SHARD.search(name))
        plain = [name for name in single if name.removesuffix(suffix) in PLAIN_STEMS]
        indices = sorted(name for name in names if name.endswith(f"{suffix}.index.json"))
        for found in (plain, indices, single):
            if len(found) > 1:
                raise ValueError(f"{where} holds several sets of weights, keep one of {found}")
            if found:
                return [*found, *(_shards(names, open_file(found[0]), where) if found is indices else ())]
    shards = sorted(name for name in names if SHARD.search(name) and name.endswith(tuple(READERS)))
    if shards:
        index = SHARD.sub(".", shards[0]) + ".index.json"
        raise FileNotFoundError(f"{where} holds shards of weights ({', '.join(shards)}), but not their index, {index}")
    pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
    if pickles:
        raise ValueError(
            f"{where} has only pickled weights ({', '.join(pickles)}), which can run code and are not read; convert"
            " them where torch is installed: safetensors.torch.save_file(torch.load(FILE, weights_only=True),"
            " 'model.safetensors'), and give the folder that has this file beside its config.json"
        )
    raise FileNotFoundError(f"no {' or '.join(f'*{suffix}' for suffix in READERS)} in {where}")


def _shards(names: set[str], index: Path, where: str) -> list[str]:
    """The files that an index names, all of them among ``names``."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} is damaged: it has no weight_map of file names")
    shards = sorted(set(weight_map.values()))
    absent = [name for name in shards if name not in names]
    if absent or not shards:
        raise FileNotFoundError(f"{where}: {index.name} names shards that are not there: {absent}")
    return shards


def read_tensors(files: list[Path]) -> dict[str, np.ndarray]:
    """All tensors of the files that ``weight_files`` names, by published name, in the type they are stored in.

    Raises:
      ValueError: a file is damaged.
    """
    tensors = {}
    for path in files:
        if path.suffix in READERS:
            tensors.update(READERS[path.suffix](path))
    return tensors


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="np") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (a handle is no dict)
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged: {' '.join(str(error).split())}") from error
    except AttributeError as error:  # as the library says that numpy has no such type
        raise ValueError(f"{path.name} has numbers of 8 bits, which are not read: convert it to 16 or 32") from error


def _read_msgpack(path: Path) -> dict[str, np.ndarray]:
    """The parameter tree that a Flax class of transformers or diffusers saved, under published names."""
    try:
        leaves = traverse_util.flatten_dict(serialization.msgpack_restore(path.read_bytes()))
        if not all(isinstance(leaf, np.ndarray) for leaf in leaves.values()):
            raise ValueError("it holds more than arrays")
        return to_published(traverse_util.unflatten_dict(leaves), "")
    except Exception as error:  # what msgpack raises depends on where the bytes are cut
        raise ValueError(f"{path.name} is damaged: {' '.join(str(error).split())}") from error


# The formats, in the order of choice where a folder has several.
READERS = {".safetensors": _read_safetensors, ".msgpack": _read_msgpack}


def sha256(files: Mapping[str, Path]) -> str:
    """The hash of files by the names that they go by, and of their contents; where they lie does not count."""
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        with path.open("rb") as file:
            digest.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def published_name(path: tuple[str, ...], prefix: str) -> str:
    """The published name of the leaf at ``path`` of a linen tree."""
    modules = [re.sub(r"_(\d+)$", r".\1", name) for name in path[:-1]]
    name = ".".join([*modules, LEAF_NAMES.get(path[-1], path[-1])])
    return name if path[0] in UNPREFIXED else prefix + name


def to_published(params: Tree, prefix: str) -> dict[str, np.ndarray]:
    """A linen parameter tree as published tensors.

    ``safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})`` writes what torch reads too.

    Args:
      params: the tree under ``params`` of one network.
      prefix: ``TEXT_PREFIX``, ``VISION_PREFIX`` or ``VAE_PREFIX``. A CLIPModel file is the union of both
        towers and ``logit_scale``, a scalar.
    """
    leaves = traverse_util.flatten_dict(params)
    return {
        published_name(path, prefix): np.ascontiguousarray(
            np.asarray(leaf).transpose(_published_axes(path, np.ndim(leaf)))
        )
        for path, leaf in leaves.items()
    }


def to_linen(tensors: Mapping[str, np.ndarray], shapes: Tree, prefix: str) -> Tree:
    """Published tensors as a float32 linen parameter tree.

    Args:
      tensors: by published name, with or without the prefix, in any float type.
      shapes: the tree to fill, whose leaves have ``shape`` (``jax.eval_shape`` of ``init``).
      prefix: the network's, as in ``to_published``.

    Raises:
      ValueError: lists every missing, extra and misshapen tensor.
    """
    found = {_canonical_name(name, prefix): tensor for name, tensor in tensors.items()}
    leaves, wrong = {}, []
    for path, leaf in traverse_util.flatten_dict(shapes).items():
        name, axes = published_name(path, prefix), _published_axes(path, len(leaf.shape))
        expected = tuple(leaf.shape[axis] for axis in axes)
        tensor = found.pop(name, None)
        if tensor is None:
            wrong.append(f"missing {name} {expected}")
            continue
        if len(expected) == 2 and tensor.shape == (*expected, 1, 1):
            tensor = tensor[:, :, 0, 0]  # a linear layer that was published as a 1 x 1 convolution
        if tensor.shape != expected:
            wrong.append(f"misshapen {name} {tensor.shape}, expected {expected}")
        elif not jnp.issubdtype(tensor.dtype, jnp.floating):
            wrong.append(f"not of a float type: {name} is {tensor.dtype}")
        else:
            leaves[path] = np.ascontiguousarray(tensor.astype(np.float32).transpose(np.argsort(axes)))
    known = re.compile("|".join(KNOWN_EXTRAS[prefix]) or r"(?!)")
    wrong += [f"extra {name} {found[name].shape}" for name in sorted(found) if not known.fullmatch(name)]
    if wrong:
        raise ValueError("the weights do not fit the config:\n  " + "\n  ".join(wrong))
    return traverse_util.unflatten_dict(leaves)


def _canonical_name(name: str, prefix: str) -> str:
    """One spelling for the names that published files spell in several ways."""
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    top = name.partition(".")[0]
    return name if top in (*UNPREFIXED, "text_model", "vision_model") else prefix + name


def _published_axes(path: tuple[str, ...], ndim: int) -> tuple[int, ...]:
    """The axes of a linen leaf in the order of the published tensor."""
    if path[-1] != "kernel":
        return tuple(range(ndim))
    return {2: (1, 0), 4: (3, 2, 0, 1)}[ndim]
