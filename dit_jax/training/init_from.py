"""Begins a model with the parameters of another: what fits is taken, and what does not is named."""

from typing import Any, NamedTuple

import jax

from dit_jax.trees import named_leaves

POSITIONS = "pos_embed/table"  # [rows, cols, D]: another grid of patches sees the same positions, resampled


class Transfer(NamedTuple):
    """What became of the parameters of two models; lists hold names.

    Attributes:
      params: the new model's tree.
      taken: were taken over.
      resampled: the table of positions, if its grid is another.
      new: the old model does not have them; they stay fresh.
      dropped: the new model does not have them.
      misshapen: both have them in different shapes, as ``name (old) -> (new)``; they stay fresh.
    """

    params: Any
    taken: list[str]
    resampled: list[str]
    new: list[str]
    dropped: list[str]
    misshapen: list[str]


def transfer(old: Any, fresh: Any) -> Transfer:
    """Fill the tree ``fresh`` with the leaves of ``old`` that have the same name and shape.

    Leaves lie where those of ``fresh`` do.
    """
    found = named_leaves(old)
    taken, resampled, new, misshapen, leaves = [], [], [], [], []
    for name, leaf in named_leaves(fresh).items():
        given = found.pop(name, None)
        if given is None:
            new.append(name)
        elif given.shape == leaf.shape:
            taken.append(name)
            leaf = jax.device_put(given, leaf.sharding)
        elif name == POSITIONS and given.shape[2:] == leaf.shape[2:]:
            resampled.append(name)
            leaf = jax.device_put(jax.image.resize(given, leaf.shape, method="bicubic"), leaf.sharding)
        else:
            misshapen.append(f"{name} {given.shape} -> {leaf.shape}")
        leaves.append(leaf)
    params = jax.tree.unflatten(jax.tree.structure(fresh), leaves)
    return Transfer(params, taken, resampled, new, sorted(found), misshapen)
