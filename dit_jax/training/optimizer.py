"""AdamW or Muon behind clipping by the global norm, and the learning rate: linear warm-up, cosine or constant decay.

They are apart: an optimizer's updates are for a learning rate of 1, and the train step multiplies them by the schedule
at its global step. An optimizer with a schedule inside would count the steps itself, and fall behind at skipped ones.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from dit_jax.trees import leaf_name, mask_by_name

SCHEDULES = ("cosine", "constant")
OPTIMIZERS = ("adamw", "muon")


def learning_rate_schedule(name: str, peak: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """The learning rate at a step: up from 0 to ``peak`` in ``warmup_steps``, then by ``name`` to the end.

    Raises:
      ValueError: if ``name`` is not in `SCHEDULES`.
    """
    if name == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, total_steps)
    if name == "constant":
        return optax.join_schedules(
            [optax.linear_schedule(0.0, peak, warmup_steps), optax.constant_schedule(peak)], [warmup_steps]
        )
    raise ValueError(f"learning_rate_schedule is {name!r}; it can be {', '.join(SCHEDULES)}")


def make_optimizer(
    name: str,
    b1: float,
    b2: float,
    muon_momentum: float,
    weight_decay: float,
    clip_norm: float,
    moment_dtype: str = "float32",
) -> optax.GradientTransformation:
    """Updates for a learning rate of 1; only kernels decay, not biases, positions or null text.

    ``adamw`` is Loshchilov & Hutter 2019. ``muon`` (Jordan et al. 2024) turns the Nesterov momentum of the blocks'
    kernels into the nearest matrix with equal singular values, scaled to the size of AdamW's updates (Liu et al. 2025,
    with 0.2), so that learning rates carry over; everything outside the blocks, and vectors, stays with AdamW.

    AdamW's first moments and Muon's momentum are kept in ``moment_dtype``, and computed in float32. Second moments
    change by a thousandth a step, and would stand still in 16 bits.

    Raises:
      ValueError: if ``name`` is not in `OPTIMIZERS`.
    """

    def kernels(params: Any) -> Any:
        return mask_by_name(params, lambda leaf: leaf.endswith("/kernel"))

    def optimizer_of(params: Any) -> Any:
        chosen = mask_by_name(params, lambda leaf: leaf.startswith("blocks_") and leaf.endswith("/kernel"))
        return jax.tree.map(lambda yes: "muon" if yes else "adamw", chosen)

    def as_matrices(params: Any) -> Any:  # behind the axis of blocks; fused kernels have an axis for their maps
        return jax.tree.map(lambda p: optax.contrib.MuonDimensionNumbers(1, tuple(range(2, p.ndim))), params)

    update = optax.adamw(1.0, b1=b1, b2=b2, mu_dtype=moment_dtype, weight_decay=weight_decay, mask=kernels)
    if name == "muon":
        muon = optax.contrib.muon(
            1.0,
            beta=muon_momentum,
            weight_decay=weight_decay,
            mu_dtype=moment_dtype,
            muon_weight_dimension_numbers=as_matrices,
            consistent_rms=0.2,
        )
        update = optax.partition({"muon": over_blocks(muon), "adamw": update}, optimizer_of)
    elif name != "adamw":
        raise ValueError(f"optimizer is {name!r}; it can be {', '.join(OPTIMIZERS)}")
    return optax.chain(optax.clip_by_global_norm(clip_norm), update)


def over_blocks(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer that gets a kernel of all blocks as one array, ``[blocks, D, ...]``, where they are of one shape.

    One program then serves all blocks, and the compiler makes and loads a fraction of the code. The state is kept by
    block, as it would be without.
    """

    def init(params: Any) -> Any:
        stacks = Stacks(params)
        return stacks.taken_apart(optimizer.init(stacks.put_together(params)))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        stacks = Stacks(updates)
        updates, state = optimizer.update(*map(stacks.put_together, (updates, state, params)))
        return stacks.taken_apart(updates), stacks.taken_apart(state)

    return optax.GradientTransformation(init, update)


class Stacks:
    """Trees like that of some parameters, wherever they are in a larger tree, with and without an axis of blocks.

    Args:
      params: a tree of arrays, and of `optax.MaskedNode` where there is nothing to do.
    """

    def __init__(self, params: Any):
        leaves, self.structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_masked)
        self.places: dict[str, list[int]] = {}  # by name inside a block and by shape: which leaves
        for place, (path, leaf) in enumerate(leaves):
            if not _is_masked(leaf):
                name = re.sub(r"^blocks_\d+/", "", leaf_name(path))
                self.places.setdefault(f"{name} {leaf.shape}", []).append(place)

    def put_together(self, tree: Any) -> Any:
        """With trees of stacks, by name, in place of those like the parameters."""

        def is_apart(node: Any) -> bool:
            return jax.tree.structure(node, is_leaf=_is_masked) == self.structure

        def stack(node: Any) -> Any:
            if not is_apart(node):
                return node
            leaves = jax.tree.leaves(node, is_leaf=_is_masked)
            some = {name: [leaves[place] for place in places] for name, places in self.places.items()}
            return {name: each[0] if _is_masked(each[0]) else jnp.stack(each) for name, each in some.items()}

        return jax.tree.map(stack, tree, is_leaf=is_apart)

    def taken_apart(self, tree: Any) -> Any:
        """The inverse of `put_together`."""

        def is_together(node: Any) -> bool:
            return isinstance(node, dict) and node.keys() == self.places.keys()

        def split(node: Any) -> Any:
            if not is_together(node):
                return node
            leaves = [optax.MaskedNode()] * self.structure.num_leaves
            for name, places in self.places.items():
                for i, place in enumerate(places):
                    leaves[place] = node[name] if _is_masked(node[name]) else node[name][i]
            return self.structure.unflatten(leaves)

        return jax.tree.map(split, tree, is_leaf=is_together)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
