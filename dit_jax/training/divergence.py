"""What is kept of a run that has diverged, for whoever wants to know why.

    diverged/<step>.json
      step, loss, grad_norm, learning_rate, ...    of the last bad step
      records      step -> ids of the records of its batch, for every bad step of the row
      norms        block -> params, ema, gradient, and how many numbers of the gradient are not finite

The gradient is that of the last bad step, computed once more. A block is what stands at the top of the parameter tree.
Numbers that are not finite are null.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax import processes
from dit_jax.arrays import Array
from dit_jax.foreign import write_whole
from dit_jax.training.state import TrainState
from dit_jax.training.step import Batch, TrainStep
from dit_jax.trees import named_leaves

FOLDER = "diverged"


def block_norms(step: TrainStep, state: TrainState, batch: Batch) -> dict[str, dict[str, float]]:
    """Norms of parameters, average and gradient by block, and how many numbers of the gradient are not finite.

    Args:
      step: computes the gradient.
      state: before the step.
      batch: of the step.
    """

    def sums(state: TrainState, batch: Batch) -> dict[str, dict[str, Array]]:
        _, gradient = step.loss_and_gradient(state, batch)
        trees = {"params": state.params, "ema": state.ema, "gradient": gradient}
        squares = {name: jax.tree.map(lambda leaf: jnp.square(leaf).sum(), tree) for name, tree in trees.items()}
        bad = jax.tree.map(lambda leaf: (~jnp.isfinite(leaf)).sum(), gradient)
        return {name: named_leaves(tree) for name, tree in {**squares, "gradient_not_finite": bad}.items()}

    found = jax.device_get(jax.jit(sums)(state, batch))
    norms: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(found, 0.0))
    for name, leaves in found.items():
        for leaf, value in leaves.items():
            norms[leaf.split("/")[0]][name] += float(value)
    return {
        block: {name: value if name == "gradient_not_finite" else math.sqrt(value) for name, value in row.items()}
        for block, row in norms.items()
    }


def write_report(
    workdir: Path,
    step: int,
    metrics: Mapping[str, Any],
    records: Mapping[int, Sequence[str]],
    norms: dict[str, dict[str, float]],
) -> Path:
    """Write all that is kept; returns where. Of several processes the first writes."""
    path = workdir / FOLDER / f"{step:08d}.json"
    if not processes.is_first():
        return path
    path.parent.mkdir(exist_ok=True)
    row = {name: np.asarray(value).item() for name, value in metrics.items()}
    report = {"step": step, **row, "records": {str(s): list(ids) for s, ids in records.items()}, "norms": norms}
    write_whole(path, json.dumps(_finite(report), indent=2) + "\n")
    return path


def _finite(value: Any) -> Any:
    """JSON has no word for nan and infinity but null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
