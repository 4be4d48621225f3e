"""The golden run of a checkpoint format: a tiny run in float16 with skipped steps, stopped after step 4 of 6.

    JAX_PLATFORMS=cpu PYTHONPATH=. python tools/make_golden_run.py tests/training/golden

Writes ``format_N.zip``, the run as the release wrote it, and ``format_N.json``, what is true of it: the exact sum of
every leaf, and the losses of the two steps that it did not take. Made once, by the first release of a format, and never
again: later releases must load what that one wrote.
"""

import json
import math
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from dit_jax import train
from dit_jax.runtime import set_up
from dit_jax.training import loss_scale
from dit_jax.training.saved_steps import FORMAT
from dit_jax.training.state import TrainState
from dit_jax.trees import named_leaves
from tests.tiny_run import tiny_config

STOP, TOTAL = 4, 6
SMALLER = {  # than the tiny run of the tests
    "total_steps": str(TOTAL),
    "batch_size": "2",
    "warmup_steps": "0",
    "log_every": "1",
    "sample_every": "0",
    "data__num_pictures": "6",
    "data__image_size": "16",
    "model__hidden_size": "4",
    "model__num_heads": "1",
    "model__attention_head_dim": "4",
    "dtype": "float16",
}
KEPT = ("config.json", "metrics.jsonl", "checkpoints")


def sums(state: TrainState) -> dict[str, float]:
    """The sum of every leaf of a state, rounded once, so that it is the same on every machine."""
    trees = {"params": state.params, "ema": state.ema, "opt_state": state.opt_state}
    return {name: math.fsum(np.asarray(leaf, np.float64).ravel()) for name, leaf in named_leaves(trees).items()}


def losses(workdir: Path) -> dict[str, float]:
    """The losses of a run by step."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {str(row["step"]): row["loss"] for row in rows}


def main(golden: Path) -> None:
    """Make what the golden folder does not have yet."""
    if (golden / f"format_{FORMAT}.zip").exists():
        sys.exit(f"{golden} has a run of format {FORMAT}; one of another format needs another FORMAT")
    set_up(allow_cpu=True, verbose=False)
    # overflows in the first steps, and at the floor no more: there must be skipped steps, also the last, to load
    loss_scale.START, loss_scale.FLOOR = 2.0**18, 2.0**17
    with tempfile.TemporaryDirectory() as folder:
        run, whole = Path(folder) / "run", Path(folder) / "whole"
        stopped = train.run(tiny_config(**SMALLER, stop_at_step=str(STOP)), run)
        assert stopped is not None
        for path in run.iterdir():
            if path.name not in KEPT:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        train.run(tiny_config(**SMALLER), whole)
        found = losses(whole)
        total, in_a_row = int(stopped.skips.total), int(stopped.skips.in_a_row)
        assert STOP > total > in_a_row > 0, stopped.skips
        expected = {
            "step": STOP,
            "skipped": total,
            "skipped_in_a_row": in_a_row,
            "loss_scale": float(stopped.loss_scale.scale),
            "sums": sums(stopped),
            "losses": {step: loss for step, loss in found.items() if int(step) > STOP},
        }
        shutil.make_archive(str(golden / f"format_{FORMAT}"), "zip", run)
    (golden / f"format_{FORMAT}.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
