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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax import processes
from dit_jax.arrays import Array
from dit_jax.errors import DivergedError
from dit_jax.files import write_whole
from dit_jax.training.progress import describe_bad
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


def diverged(
    step: TrainStep,
    records: Callable[[range], dict[int, list[str]]],
    workdir: Path,
    state: TrainState,
    batch: Batch,
    number: int,
    metrics: Mapping[str, Array],
) -> DivergedError:
    """Write all that is kept; returns what ends the run.

    Args:
      step: computes the gradient.
      records: steps -> the ids of the records of each one's batch.
      workdir: the run's folder.
      state: before the last bad step.
      batch: of that step.
      number: of that step.
      metrics: of that step.
    """
    norms = block_norms(step, state, batch)
    row = {name: np.asarray(value).item() for name, value in metrics.items()}
    length = row["skipped_in_a_row"]
    path = workdir / FOLDER / f"{number:08d}.json"
    if processes.is_first():
        bad = records(range(number - length + 1, number + 1))
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps(_finite({"step": number, **row, "records": bad, "norms": norms}), indent=2) + "\n")
    return DivergedError(
        f"{describe_bad(row)} at step {number}, and {length} steps in a row were not finite (max_skipped_in_a_row);"
        f" none of them was saved. Records and norms: {path.relative_to(workdir)} in the workdir. Look at the data,"
        " or lower learning_rate in a new run (--config.init_from=THIS_WORKDIR begins it with these parameters)"
    )


def _finite(value: Any) -> Any:
    """JSON has no word for nan and infinity but null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
