"""What a run does beside its steps, and when: it scores its parameters, and draws grids of samples with them.

`make_duties` says when, and whether it was done at a step, whichever process did it; `score` and `draw_samples` do it.
"""

import functools
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from dit_jax import processes
from dit_jax.drawing.pictures import make_grid, save_png
from dit_jax.drawing.pipeline import Pipeline
from dit_jax.sharding import gather_whole
from dit_jax.training.loop import Duty
from dit_jax.training.validation import NAME, Validation, as_row, in_words
from dit_jax.training.writer import METRICS, Writer, row_of
from dit_jax.workdir import Workdir


def make_duties(config: ConfigDict, workdir: Workdir) -> tuple[Duty, Duty]:
    """When a run is scored, and when samples are drawn; both at the last step too."""
    validation = Duty(config.validate_every, config.total_steps, functools.partial(_is_scored, workdir.folder))
    samples = Duty(config.sample_every, config.total_steps, functools.partial(_is_drawn, workdir))
    return validation, samples


def score(validation: Validation | None, writer: Writer, params: Any, step: int) -> str:
    """Score these parameters on the records that are set aside; write the row and return it in words."""
    assert validation, "nothing is due where there is nothing to validate on"
    begin = time.monotonic()
    errors = validation(params)
    writer.metrics(step, as_row(errors))
    return f"validation step={step} {in_words(errors)} in {time.monotonic() - begin:.1f} s"


def draw_samples(
    pipeline: Pipeline, prompts: Sequence[str], workdir: Workdir, writer: Writer, params: Any, step: int
) -> str:
    """Draw the fixed prompts with fixed noise and these parameters; write a grid, and show it on TensorBoard.

    Of several processes the first draws, with its own copy of the parameters, and the others wait.
    """
    name = _grid_of(step)
    whole = gather_whole(params)
    if processes.is_first():
        pipeline.params, pipeline.trained = processes.own_copy(whole), replace(pipeline.trained, step=step)
        pixels = pipeline.draw(prompts, range(len(prompts)))
        grid = make_grid([Image.fromarray(p) for p in pixels], columns=min(len(prompts), 4))
        path = workdir.folder / name
        path.parent.mkdir(exist_ok=True)
        save_png(grid, path, {"prompt": "\n".join(prompts), "seed": f"0 to {len(prompts) - 1}", "step": str(step)})
        writer.image(step, "samples", np.asarray(grid))
    processes.barrier()
    return f"samples of step {step}: {workdir.place / name}"


def _is_scored(folder: Path, step: int) -> bool:
    return processes.of_first(processes.is_first() and NAME in row_of(folder / METRICS, step))


def _is_drawn(workdir: Workdir, step: int) -> bool:
    return processes.of_first(processes.is_first() and workdir.has(_grid_of(step)))


def _grid_of(step: int) -> str:
    """Where the grid of a step lies in the workdir."""
    return f"samples/{step:08d}.png"
