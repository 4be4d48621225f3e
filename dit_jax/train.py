"""Trains a model: one call, `run`, from a config to a finished workdir.

    workdir/  config.json  checkpoints/<step>/  metrics.jsonl  timing.jsonl  tb/  samples/  STATUS.json  report.html
              encoded/ with data.encode=once; bad_records.jsonl, diverged/, logs/ where there was something to tell

Several processes call it alike (`dit_jax.processes`); the first of them writes and says what there is to say.

Called again with the same config it goes on where the last checkpoint ends, and leaves the same files and numbers
as a run that was never interrupted.
"""

import functools
import itertools
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

import dit_jax
from dit_jax import build, processes
from dit_jax.config import is_export, mend_run, take_over, to_json
from dit_jax.data.ahead import ahead
from dit_jax.drawing.pipeline import Pipeline
from dit_jax.duties import draw_samples, make_duties, open_report, reported, score, write_page
from dit_jax.encoded import Place
from dit_jax.ending import writable
from dit_jax.errors import CheckpointError, ConfigError
from dit_jax.feed import open_feed, open_validation
from dit_jax.files import write_whole
from dit_jax.metrics.report import Report
from dit_jax.models.flops import peak_flops, training_flops
from dit_jax.origin import begin_from
from dit_jax.parts import PACKAGES, Parts, describe, gather, refuse_another
from dit_jax.runtime import git_commit, say
from dit_jax.sharding import put_batch
from dit_jax.stored import Trained
from dit_jax.stores import folder_of
from dit_jax.training.checkpoint import Best, Checkpoints
from dit_jax.training.divergence import diverged
from dit_jax.training.loop import Duty, Loop, is_multiple
from dit_jax.training.progress import Beginning, Progress
from dit_jax.training.room import check_room
from dit_jax.training.saved_steps import ITEMS, newest_whole, restore_metadata, set_aside
from dit_jax.training.state import TrainState, init_state
from dit_jax.training.status import Status, read_status
from dit_jax.training.step import TrainStep
from dit_jax.training.stop import Stop
from dit_jax.training.validation import NAME, Validation
from dit_jax.training.watchdog import Watchdog
from dit_jax.training.writer import Silent, Watch, Writer, figures
from dit_jax.trees import count_parameters
from dit_jax.workdir import METRICS, Workdir, open_workdir

GRID = 16  # captions of the training set in a sample grid when the config names no prompts
AHEAD = 3  # batches that are on the devices, or on their way, before the step that takes them


def run(
    config: ConfigDict,
    workdir: Path | str,
    watch: Watch | None = None,
    extend: bool = False,
    begun: float | None = None,
) -> TrainState | None:
    """Train from the config, or from where ``workdir`` stands, to ``total_steps`` or ``stop_at_step``.

    Args:
      config: as `dit_jax.config.load_config` returns it; its gaps are filled in place.
      workdir: the run's folder, here or in a bucket; made if it is not there.
      watch: called with a step and its row of numbers, or its grid of samples as uint8 ``[height, width, 3]``, as soon
        as they are written; what a notebook draws.
      extend: whether a run that is there may become longer by a larger ``total_steps``.
      begun: when the program was started that does nothing else, on the clock of `time.monotonic`.

    Returns:
      The state at the end; None if there was nothing left to do.

    Raises:
      ConfigError: values that cannot be, or a workdir that belongs to another config, data or encoders.
      DataError: a data set that cannot be read.
      DivergedError: too many steps in a row whose loss or gradient is not finite; none of them is saved.
      PreemptedError, KeyboardInterrupt: it was told to stop; the last step that was done is saved.
      CheckpointError: there are checkpoints, but none that can be used.
      WorkdirError: a workdir that cannot be written to or is full; what was said to be saved is.
      FetchError: a bucket that cannot be reached.
    """
    beginning = Beginning(begun or time.monotonic())
    if begun is not None:
        beginning.done("imports")
    with open_workdir(folder_of(str(workdir))) as opened:
        return train(config, opened, watch, extend, beginning)


def train(
    config: ConfigDict, workdir: Workdir, watch: Watch | None, extend: bool, beginning: Beginning
) -> TrainState | None:
    """All of a run, in a workdir that is at hand; see `run`."""
    begun = datetime.now(UTC)
    deadline = time.monotonic() + 3600 * config.max_hours if config.max_hours else None
    parts = gather(config, workdir)
    beginning.done("data and encoders")

    # ---- where it stands
    checkpoints, start = open_checkpoints(parts, extend)
    stop = min(config.stop_at_step or config.total_steps, config.total_steps)
    banner(parts, start)
    duties = make_duties(config, workdir)
    saved = restore_metadata(checkpoints.directory, start) if start else {}
    status = Status(workdir.folder, start, config.total_steps, saved.get("productive_seconds", 0.0), begun)
    report = open_report(workdir, saved)
    if start >= stop and not any(duty.owed(start) for duty in duties):
        limit = "" if stop == config.total_steps else f" (stop_at_step {stop} of {config.total_steps})"
        say(f"nothing to do: step {start} of {stop} is done{limit}")
        checkpoints.close()
        status.settle()
        write_page(report)
        return None

    with reported(report), status, checkpoints.room(), closing(checkpoints):
        saves = [step for step in range(start + 1, stop + 1) if step == stop or is_multiple(step, config.save_every)]
        keeps = config.keep_latest, config.keep_every, config.keep_best
        for note in parts.notes + check_room(checkpoints.directory, parts.shapes, saves, *keeps):
            say(f"warning: {note}")
        state = checkpoints.restore(start, parts.shapes) if start else begin(parts)
        beginning.done("restore" if start else "init")
        steps = range(start + 1, stop + 1)
        state = take_steps(parts, duties, checkpoints, status, report, state, steps, deadline, watch, beginning)
    say(f"done: step {int(state.step)} of {config.total_steps}")
    return state


def begin(parts: Parts) -> TrainState:
    """The state of a new run."""
    config, side = parts.config, parts.side
    state = init_state(parts.model, parts.optimizer, jax.random.key(config.seed), side, side, parts.mesh)
    if not config.init_from:
        return state
    return begin_from(config, parts.identity, state, parts.vae.factor, say)


def take_steps(
    parts: Parts,
    duties: tuple[Duty, Duty],
    checkpoints: Checkpoints,
    status: Status,
    report: Report,
    state: TrainState,
    steps: range,
    deadline: float | None,
    watch: Watch | None,
    beginning: Beginning,
) -> TrainState:
    """Encode, compile, and take the steps of this process.

    Args:
      parts: of the run.
      duties: validation and samples.
      checkpoints, status, report: of the run.
      state: after the step before the first; its arrays are given up.
      steps: perhaps none, where only a duty is left.
      deadline: when to stop, on the clock of `time.monotonic`.
      watch: as of `run`.
      beginning: of this process.
    """
    config, workdir, mesh = parts.config, parts.workdir, parts.mesh
    scaled = " with a dynamic loss scale" if parts.model.dtype == jnp.float16 else ""
    say(f"parameters: {count_parameters(state.params):,}; compute in {np.dtype(parts.model.dtype).name}{scaled}")
    encoders = parts.vae, parts.preview, parts.text_encoder
    kept = place_for(parts, "train", parts.identity["data"])
    feed = open_feed(config, parts.source, *encoders, say, listed=workdir.bad_records, kept=kept)
    validation = make_validation(parts)
    beginning.done("encoding")
    if processes.is_first():
        with writable(workdir.folder):
            write_whole(workdir.folder / "config.json", to_json(config))
    report.about = describe(parts, count_parameters(state.params))  # with what was measured of the latents
    step_function = build.make_step(config, parts.model, parts.process, parts.optimizer, parts.learning_rate)
    flops = training_flops(parts.model, parts.side, parts.side)

    def stalled(reason: str) -> None:
        status.stalled(reason)
        write_page(report)
        workdir.bring()

    start, stop = steps.start - 1, steps.stop - 1
    rows = feed.batches(start, stop, processes.own_rows(config.batch_size))
    on_devices = (put_batch(batch, mesh) for batch in rows)
    with (
        closing(make_writer(config, workdir.folder, start, watch)) as writer,
        closing(make_progress(config, writer, start, flops, mesh, beginning)) as progress,
        closing(ahead(on_devices, AHEAD, config.data.patience, config.data.source)) as coming,
    ):
        write_page(report)  # again: the writer has cut off what an earlier life wrote of later steps
        pipeline = Pipeline(
            config, parts.preview, parts.text_encoder, state.ema, Trained(start, "ema", **parts.identity)
        )
        prompts = config.sample.prompts or tuple(
            captions[0] for captions in itertools.islice(filter(None, parts.source.captions()), GRID)
        )
        train_steps: dict[tuple[int, ...], Callable[..., Any]] = {}
        batches: Iterator[dict[str, jax.Array]] = coming
        if steps:
            first = next(coming)
            beginning.done("first batch")
            train_steps = compile_steps(step_function, state, first, feed.grids)
            beginning.done("compile")
            batches = itertools.chain([first], coming)
        with (
            Stop(deadline, processes.agreement()) as told,
            Watchdog(config.stall_patience, workdir.folder / "logs", stalled) as watchdog,
        ):
            loop = Loop(
                train_steps=train_steps,
                batches=batches,
                save_every=config.save_every,
                validation=duties[0],
                samples=duties[1],
                validate=functools.partial(score, validation, writer, report),
                draw=functools.partial(draw_samples, pipeline, prompts, workdir, writer, report),
                checkpoints=checkpoints,
                metadata=report.about,
                progress=progress,
                status=status,
                stop=told,
                watchdog=watchdog,
                max_skipped_in_a_row=config.max_skipped_in_a_row,
                diverged=functools.partial(diverged, step_function, feed.records, workdir.folder),
            )
            return loop.run(state, steps)


def make_validation(parts: Parts) -> Validation | None:
    """What scores the run; None where nothing does."""
    if parts.held_out is None:
        return None
    config, data = parts.config, parts.config.data
    which = f"{parts.identity['data']}, {data.validation_fraction} and {data.validation_records} of the others"
    kept = place_for(parts, "validation", which)
    encoders = parts.vae, parts.text_encoder
    records = open_validation(config, parts.held_out, *encoders, say, listed=parts.workdir.bad_records, kept=kept)
    return build.make_validation(config, parts.model, parts.process, records, parts.mesh)


def place_for(parts: Parts, part: str, fingerprint: str) -> Place | None:
    """Where a part of the data is kept as it was encoded."""
    folder = parts.workdir.encoded
    return Place(folder / part, fingerprint) if folder else None


def open_checkpoints(parts: Parts, extend: bool) -> tuple[Checkpoints, int]:
    """The checkpoints of a run, which is a new one or the same as before in config, data and encoders, and its step.

    The newest is verified; where it is damaged, it is set aside and the run goes on from the one before. Of several
    processes the first does both.
    """
    config, workdir, place = parts.config, parts.workdir, parts.workdir.place
    directory = workdir.checkpoints
    with writable(place):
        if processes.is_first() and workdir.folder.is_dir():
            workdir.lock()
    whole, damaged = newest_whole(directory, config.verify_checkpoints, ITEMS) if processes.is_first() else (None, [])
    step = processes.of_first(whole and whole.step)
    if step is not None:
        say(f"checkpoint: {whole}")
        metadata = restore_metadata(directory, step)
        if processes.is_first() and (lost := mend_run(workdir.folder, metadata.get("config"))):
            say(f"warning: {lost}; it is written again from the checkpoint")
        processes.barrier()
        take_over(config, workdir.folder, extend)
        refuse_another(metadata, parts.identity)
    elif is_export(workdir.folder / "config.json"):
        raise ConfigError(f"{place} is an export, not a run: give another --workdir (init_from={place} begins with it)")
    elif saved := processes.of_first(read_status(workdir.folder).get("saved", 0)):
        raise CheckpointError(
            f"{place} is a run that has saved step {saved}, and {directory} has no checkpoint: put it back, or begin"
            " anew in another --workdir"
        )
    with writable(place):
        if processes.is_first():
            workdir.folder.mkdir(parents=True, exist_ok=True)
            workdir.lock()
            for report in damaged:
                say(f"warning: checkpoint: {report}; set aside as {set_aside(directory, report.step)}")
        best = Best(config.keep_best, functools.partial(figures, workdir.folder / METRICS, NAME))
        checkpoints = Checkpoints(directory, config.keep_latest, config.keep_every, best, before_commit=workdir.bring)
    return checkpoints, step or 0


def banner(parts: Parts, start: int) -> None:
    """Say what runs, on what, with which data and encoders, and where it begins."""
    packages = " ".join(f"{name} {version(name)}" for name in PACKAGES)
    say(f"dit_jax {dit_jax.__version__} ({git_commit()}), Python {platform.python_version()}, {packages}")
    say(f"devices: {parts.mesh.size} x {jax.devices()[0].device_kind}, mesh {dict(parts.mesh.shape)}")
    data = parts.config.data
    held_out = f", {len(parts.held_out):,} others validate" if parts.held_out is not None else ""
    say(f"data: {data.source}, {len(parts.source):,} records, {data.image_size} px{held_out}")
    for encoder in (parts.vae, parts.text_encoder):
        say(f"encoder: {encoder.name} sha256 {encoder.sha256[:12]}")
    say(f"workdir: {parts.workdir.place}, " + (f"resuming from step {start}" if start else "a new run"))


def make_writer(config: ConfigDict, workdir: Path, start: int, watch: Watch | None) -> Writer:
    """Where the numbers of this process go."""
    if not processes.is_first():
        return Silent()
    return Writer(workdir, start, config.wandb_project, config.to_dict(), watch)


def make_progress(
    config: ConfigDict, writer: Writer, start: int, flops: int, mesh: Mesh, beginning: Beginning
) -> Progress:
    """What is said about a run; ``flops`` are of one training picture."""
    peak = peak_flops(jax.devices()[0].device_kind)
    return Progress(
        writer,
        log_every=config.log_every,
        start=start,
        total_steps=config.total_steps,
        batch_size=config.batch_size,
        flops=flops,
        peak=peak and peak * mesh.size,
        beginning=beginning,
    )


def compile_steps(
    step: TrainStep, state: TrainState, batch: dict[str, jax.Array], grids: Sequence[tuple[int, int]]
) -> dict[tuple[int, ...], Callable[..., Any]]:
    """Compile the train step for batches like this one on every latent grid, and say how long that took.

    All processes return at a time: the first all-reduce does not wait for one that is slower.
    """
    several = f" for {len(grids)} shapes of pictures" if len(grids) > 1 else ""
    say(f"compiling the train step{several} ...")
    begin = time.monotonic()
    compiled: dict[tuple[int, ...], Callable[..., Any]] = {}
    for h, w in grids:
        shapes = {key: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for key, a in batch.items()}
        for key in ("mean", "std"):
            B, *_, C = shapes[key].shape
            shapes[key] = shapes[key].update(shape=(B, h, w, C))
        compiled[h, w] = step.compile(state, shapes)
    processes.barrier()
    say(f"compiled the train step in {time.monotonic() - begin:.1f} s")
    return compiled
