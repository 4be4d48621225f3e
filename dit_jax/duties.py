"""What a run does beside its steps, and when: it scores its parameters, draws grids of samples, and writes its page.

`make_duties` says when, and whether it was done at a step, whichever process did it; `score` and `draw_samples` do it.
The page (`dit_jax.metrics.report`) is written when a run begins, after each of the two, and however it ends.
"""

import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from dit_jax import processes
from dit_jax.config import defaults
from dit_jax.drawing.pictures import make_grid, save_png
from dit_jax.drawing.pipeline import Pipeline
from dit_jax.errors import CheckpointError
from dit_jax.metrics.report import Report
from dit_jax.sharding import gather_whole
from dit_jax.training.loop import Duty
from dit_jax.training.saved_steps import restore_metadata, steps_of
from dit_jax.training.validation import NAME, Validation, as_row, in_words
from dit_jax.training.writer import Writer, row_of
from dit_jax.workdir import METRICS, Workdir


def make_duties(config: ConfigDict, workdir: Workdir) -> tuple[Duty, Duty]:
    """When a run is scored, and when samples are drawn; both at the last step too."""
    validation = Duty(config.validate_every, config.total_steps, functools.partial(_is_scored, workdir.folder))
    samples = Duty(config.sample_every, config.total_steps, functools.partial(_is_drawn, workdir))
    return validation, samples


def score(validation: Validation | None, writer: Writer, report: Report, params: Any, step: int) -> str:
    """Score these parameters on the records that are set aside; write row and page and return it in words."""
    assert validation, "nothing is due where there is nothing to validate on"
    begin = time.monotonic()
    errors = validation(params)
    writer.metrics(step, as_row(errors))
    write_page(report)
    return f"validation step={step} {in_words(errors)} in {time.monotonic() - begin:.1f} s"


def draw_samples(
    pipeline: Pipeline,
    prompts: Sequence[str],
    workdir: Workdir,
    writer: Writer,
    report: Report,
    params: Any,
    step: int,
) -> str:
    """Draw the fixed prompts with fixed noise and these parameters; write a grid, show it on TensorBoard and the page.

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
        write_page(report)
    processes.barrier()
    return f"samples of step {step}: {workdir.place / name}"


def open_report(workdir: Workdir, about: dict[str, Any]) -> Report:
    """The page of a run; ``about``: what its checkpoints say of it."""
    return Report(workdir.folder, workdir.place, about, defaults())


def make_page_again(workdir: Workdir) -> str:
    """Write the page of a run that nothing trains now, by its newest checkpoint; returns a warning if that failed."""
    steps = steps_of(workdir.checkpoints)
    try:
        about = restore_metadata(workdir.checkpoints, steps[-1]) if steps else {}
    except CheckpointError:
        about = {}
    return open_report(workdir, about).write()


@contextmanager
def reported(report: Report) -> Iterator[None]:
    """A page that is there from now on, and says how it ended, whatever the end is."""
    write_page(report)
    try:
        yield
    finally:
        write_page(report)


def write_page(report: Report) -> None:
    """Write the page of a run, or say why that failed; of several processes the first does."""
    if warning := processes.is_first() and report.write():
        tqdm.write(f"warning: {warning}")


def _is_scored(folder: Path, step: int) -> bool:
    return processes.of_first(processes.is_first() and NAME in row_of(folder / METRICS, step))


def _is_drawn(workdir: Workdir, step: int) -> bool:
    return processes.of_first(processes.is_first() and workdir.has(_grid_of(step)))


def _grid_of(step: int) -> str:
    """Where the grid of a step lies in the workdir."""
    return f"samples/{step:08d}.png"
