"""Where a run's numbers go: ``metrics.jsonl`` (functions of config and step alone), ``timing.jsonl`` (speeds),
TensorBoard and, if asked for, Weights & Biases.

On resume, rows past the restored step are cut off first, so that a resumed run leaves the files of a run that was
never interrupted.
"""

import json
import math
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.files import read_rows, write_whole
from dit_jax.training.tensorboard import Board
from dit_jax.workdir import METRICS, TIMING

Watch = Callable[[int, dict[str, float] | np.ndarray], None]


def truncate_rows(path: Path, last_step: int) -> None:
    """Drop the rows of a JSON-lines file whose ``step`` is beyond ``last_step``; atomic. What is no row goes too."""
    if not path.exists():
        return
    kept = [line for line, row in read_rows(path) if type(row.get("step")) is int and row["step"] <= last_step]
    write_whole(path, "".join(line + "\n" for line in kept))


def row_of(path: Path, step: int) -> dict[str, Any]:
    """All that a JSON-lines file has of a step, in one row."""
    found: dict[str, Any] = {}
    for _, row in read_rows(path) if path.is_file() else ():
        if row.get("step") == step:
            found |= row
    return found


def figures(path: Path, name: str) -> dict[int, float]:
    """What a JSON-lines file has by a name, by step."""
    return {row["step"]: row[name] for _, row in read_rows(path) if _is_figure(row, name)} if path.is_file() else {}


def _is_figure(row: dict[str, Any], name: str) -> bool:
    return type(row.get("step")) is int and isinstance(row.get(name), int | float)


class Writer:
    """Writes rows of numbers by step.

    Args:
      workdir: the run's folder.
      step: the step that the run starts from; later rows of an earlier life are cut off.
      wandb_project: "" for none. Needs the extra ``wandb``. The file ``wandb_id`` says which of its runs this is.
      config: the resolved config, shown by Weights & Biases.
      watch: is given every step's row and every picture, as they come; None for nobody.
    """

    def __init__(self, workdir: Path, step: int, wandb_project: str, config: dict[str, Any], watch: Watch | None):
        for name in (METRICS, TIMING):
            truncate_rows(workdir / name, step)
        self._metrics, self._timing = workdir / METRICS, workdir / TIMING
        self._board = Board(workdir / "tb", step)
        self._watch = watch
        self._wandb = None
        if wandb_project:
            import wandb

            path = workdir / "wandb_id"
            if not (step and path.is_file()):
                path.write_text(secrets.token_hex(4))
            self._wandb = wandb.init(
                project=wandb_project, dir=str(workdir), config=config, id=path.read_text(), resume="allow"
            )

    def metrics(self, step: int, row: dict[str, float]) -> None:
        """Numbers that the same config gives again at the same step."""
        self._write(self._metrics, step, row)
        if self._watch is not None:
            self._watch(step, row)

    def timing(self, step: int, row: dict[str, float]) -> None:
        """Speeds, waits and memory: they differ from run to run."""
        self._write(self._timing, step, row)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """A picture, uint8 ``[height, width, 3]``, for TensorBoard and whoever watches."""
        self._board.image(step, name, image)
        if self._watch is not None:
            self._watch(step, image)

    def _write(self, path: Path, step: int, row: dict[str, float]) -> None:
        finite = {name: value for name, value in row.items() if math.isfinite(value)}
        with path.open("a") as file:  # JSON has no word for nan and infinity but null
            file.write(json.dumps({"step": step, **dict.fromkeys(row), **finite}) + "\n")
        self._board.numbers(step, finite)
        if self._wandb is not None:
            self._wandb.log(finite, step=step)

    def close(self) -> None:
        """End the run at Weights & Biases; all else is written already."""
        if self._wandb is not None:
            self._wandb.finish()


class Silent(Writer):
    """What the processes beside the first have in its place: it writes nothing."""

    def __init__(self) -> None:
        pass

    def metrics(self, step: int, row: dict[str, float]) -> None:
        """The first process writes them."""

    def timing(self, step: int, row: dict[str, float]) -> None:
        """The first process writes its own."""

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """The first process shows it."""

    def close(self) -> None:
        """There is nothing to close."""
