"""What a run does beside its steps, and when: it scores its parameters, and draws grids of samples with them.

Each is something to do, given parameters and a step, and a look whether it was done at a step, whichever process did
it: see `dit_jax.training.loop.Duty`.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dit_jax import processes
from dit_jax.drawing.pictures import make_grid, save_png
from dit_jax.drawing.pipeline import Pipeline
from dit_jax.training.validation import NAME, Validation, as_row, in_words
from dit_jax.training.writer import Writer, has_row
from dit_jax.workdir import Workdir


class Due(NamedTuple):
    """What is due when: every so many steps, 0 for never, and at the last step of the run too."""

    save_every: int
    validate_every: int
    sample_every: int
    total_steps: int

    def saves(self, step: int) -> bool:
        """Whether the state is saved after a step, even if the run goes on."""
        return _is_multiple(step, self.save_every)

    def validates(self, step: int) -> bool:
        """Whether a step is followed by a validation."""
        return self.validate_every > 0 and (step == self.total_steps or _is_multiple(step, self.validate_every))

    def samples(self, step: int) -> bool:
        """Whether a step is followed by a grid of samples."""
        return self.sample_every > 0 and (step == self.total_steps or _is_multiple(step, self.sample_every))


def score(validation: Validation | None, writer: Writer, params: Any, step: int) -> str:
    """Score these parameters on the records that are set aside; write the row and return it in words."""
    assert validation, "nothing is due where there is nothing to validate on"
    begin = time.monotonic()
    errors = validation(params)
    writer.metrics(step, as_row(errors))
    return f"validation step={step} {in_words(errors)} in {time.monotonic() - begin:.1f} s"


def is_scored(workdir: Path, step: int) -> bool:
    """Whether the parameters of a step were validated."""
    return processes.of_first(has_row(workdir / "metrics.jsonl", step, NAME))


def draw_samples(
    pipeline: Pipeline, prompts: Sequence[str], workdir: Workdir, writer: Writer, params: Any, step: int
) -> str:
    """Draw the fixed prompts with fixed noise and these parameters; write a grid, and show it on TensorBoard.

    Of several processes the first draws, with its own copy of the parameters, and the others wait.
    """
    name = grid_of(step)
    if processes.is_first():
        pipeline.params, pipeline.trained = processes.own_copy(params), replace(pipeline.trained, step=step)
        pixels = pipeline.draw(prompts, range(len(prompts)))
        grid = make_grid([Image.fromarray(p) for p in pixels], columns=min(len(prompts), 4))
        path = workdir.folder / name
        path.parent.mkdir(exist_ok=True)
        save_png(grid, path, {"prompt": "\n".join(prompts), "seed": f"0 to {len(prompts) - 1}", "step": str(step)})
        writer.image(step, "samples", np.asarray(grid))
    processes.barrier()
    return f"samples of step {step}: {workdir.place / name}"


def is_drawn(workdir: Workdir, step: int) -> bool:
    """Whether the grid of a step is there."""
    return processes.of_first(workdir.has(grid_of(step)))


def grid_of(step: int) -> str:
    """Where the grid of a step lies in the workdir."""
    return f"samples/{step:08d}.png"


def _is_multiple(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
