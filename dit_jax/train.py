"""Trains a model: one call, `run`, from a config to a finished workdir.

    workdir/  config.json  checkpoints/<step>/  metrics.jsonl  timing.jsonl  tb/  samples/  STATUS.json
              bad_records.jsonl, diverged/, logs/ where there was something to tell

Several processes call it alike (`dit_jax.processes`); the first of them writes and says what there is to say.

Called again with the same config it goes on where the last checkpoint ends, and leaves the same files and numbers
as a run that was never interrupted.
"""

import contextlib
import functools
import itertools
import platform
import tempfile
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
from dit_jax.config import is_export, take_over, to_json
from dit_jax.data.ahead import ahead
from dit_jax.drawing.pipeline import Pipeline
from dit_jax.duties import Due, draw_samples, is_drawn, is_scored, score
from dit_jax.encoders import VAE, TextEncoder
from dit_jax.errors import ConfigError, FetchError
from dit_jax.feed import open_feed, open_validation
from dit_jax.files import write_whole
from dit_jax.models.flops import peak_flops, training_flops
from dit_jax.resolve import resolve
from dit_jax.runtime import git_commit, writable
from dit_jax.sharding import make_mesh, put_batch
from dit_jax.stored import Trained, begin_from, open_origin
from dit_jax.stores import folder_of
from dit_jax.training.checkpoint import Best, Checkpoints
from dit_jax.training.divergence import diverged
from dit_jax.training.loop import Duty, Loop
from dit_jax.training.progress import Progress
from dit_jax.training.room import check_room
from dit_jax.training.saved_steps import ITEMS, newest_whole, restore_metadata, set_aside
from dit_jax.training.state import TrainState, abstract_state, init_state
from dit_jax.training.status import Status
from dit_jax.training.step import TrainStep
from dit_jax.training.stop import Stop
from dit_jax.training.validation import NAME
from dit_jax.training.watchdog import Watchdog
from dit_jax.training.writer import Silent, Watch, Writer, figures
from dit_jax.trees import count_parameters
from dit_jax.workdir import Workdir, open_workdir

GRID = 16  # captions of the training set in a sample grid when the config names no prompts
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint")
AHEAD = 3  # batches that are on the devices, or on their way, before the step that takes them


def run(config: ConfigDict, workdir: Path | str, watch: Watch | None = None, extend: bool = False) -> TrainState | None:
    """Train from the config, or from where ``workdir`` stands, to ``total_steps`` or ``stop_at_step``.

    Args:
      config: as `dit_jax.config.load_config` returns it; its gaps are filled in place.
      workdir: the run's folder, here or in a bucket; made if it is not there.
      watch: called with a step and its row of numbers, or its grid of samples as uint8 ``[height, width, 3]``, as soon
        as they are written; what a notebook draws.
      extend: whether a run that is there may become longer by a larger ``total_steps``.

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
    with open_workdir(folder_of(str(workdir))) as opened:
        return train(config, opened, watch, extend)


def train(config: ConfigDict, workdir: Workdir, watch: Watch | None, extend: bool) -> TrainState | None:
    """All of a run, in a workdir that is at hand; see `run`."""
    begun = datetime.now(UTC)
    deadline = time.monotonic() + 3600 * config.max_hours if config.max_hours else None
    due = Due(config.save_every, config.validate_every, config.sample_every, config.total_steps)

    # ---- what there is
    mesh = make_mesh(jax.devices())
    source = build.make_source(config, "train")  # first: a folder that is not there must cost no download
    with offer_embedded():
        vae, text_encoder = build.make_vae(config), build.make_text_encoder(config)
    preview = build.make_preview_vae(config, vae)
    notes = resolve(config, len(source), vae.shape, text_encoder.shape, mesh.size)
    held_out = build.make_validation_source(config) if config.validate_every else None
    dtype = build.compute_dtype(config.dtype, jax.devices()[0])
    model, process = build.make_model(config, dtype), build.make_process(config)
    build.make_times(config, process)  # needed later: what cannot be is refused before anything is written
    build.make_weight(config, process)
    build.make_sampler(config, process, build.make_grid(config, process))
    optimizer, learning_rate = build.make_optimizer(config)
    identity = {"data": source.fingerprint(), "vae": vae.sha256, "text_encoder": text_encoder.sha256}

    # ---- where it stands
    checkpoints = open_checkpoints(config, workdir, identity, extend)
    start = processes.of_first(checkpoints.latest_step() or 0)
    stop = min(config.stop_at_step or config.total_steps, config.total_steps)
    banner(config, workdir.place, start, mesh, len(source), len(held_out or ()), (vae, text_encoder))
    scored, drawn = functools.partial(is_scored, workdir.folder), functools.partial(is_drawn, workdir)
    spent = restore_metadata(checkpoints.directory, start).get("productive_seconds", 0.0) if start else 0.0
    status = Status(workdir.folder, start, config.total_steps, spent, begun)
    owed = start and ((due.validates(start) and not scored(start)) or (due.samples(start) and not drawn(start)))
    if start >= stop and not owed:
        limit = "" if stop == config.total_steps else f" (stop_at_step {stop} of {config.total_steps})"
        say(f"nothing to do: step {start} of {stop} is done{limit}")
        checkpoints.close()
        status.settle()
        return None
    side = config.data.image_size // vae.factor
    shapes = abstract_state(model, optimizer, side, side, mesh)
    saves = [step for step in range(start + 1, stop + 1) if step == stop or due.saves(step)]
    keeps = config.keep_latest, config.keep_every, config.keep_best
    notes += check_room(checkpoints.directory, shapes, saves, *keeps)
    for note in notes:
        say(f"warning: {note}")

    # ---- state, data, step
    if start:
        state = checkpoints.restore(start, shapes)
    else:
        state = init_state(model, optimizer, jax.random.key(config.seed), side, side, mesh)
        if config.init_from:
            state = begin_from(open_origin(config, identity, say), state, vae.factor, say)
    scaled = " with a dynamic loss scale" if dtype == jnp.float16 else ""
    say(f"parameters: {count_parameters(state.params):,}; compute in {np.dtype(dtype).name}{scaled}")
    feed = open_feed(config, workdir.folder, source, vae, preview, text_encoder, say)
    validation = None
    if held_out is not None:
        listed = processes.own_file(workdir.folder / "bad_records.jsonl")
        records = open_validation(config, listed, held_out, vae, text_encoder, say)
        validation = build.make_validation(config, model, process, records, mesh)
    if processes.is_first():
        with writable(workdir.folder):
            write_whole(workdir.folder / "config.json", to_json(config))
    step_function = build.make_step(config, model, process, optimizer, learning_rate)

    def stalled(reason: str) -> None:
        status.stalled(reason)
        workdir.bring()

    # ---- the loop
    with (
        checkpoints.room(),
        closing(checkpoints),
        status,
        closing(make_writer(config, workdir.folder, start, watch)) as writer,
        closing(make_progress(config, writer, start, training_flops(model, side, side), mesh)) as progress,
    ):
        pipeline = Pipeline(config, preview, text_encoder, state.ema, Trained(start, "ema", **identity))
        prompts = config.sample.prompts or tuple(
            captions[0] for captions in itertools.islice(filter(None, source.captions()), GRID)
        )
        mine = feed.batches(start, stop, processes.own_rows(config.batch_size))
        on_devices = (put_batch(batch, mesh) for batch in mine)
        with closing(ahead(on_devices, AHEAD, config.data.patience, config.data.source)) as coming:
            train_steps: dict[tuple[int, ...], Callable[..., Any]] = {}
            batches: Iterator[dict[str, jax.Array]] = coming
            if start < stop:
                first = next(coming)
                train_steps = compile_steps(step_function, state, first, feed.grids)
                batches = itertools.chain([first], coming)
            with (
                Stop(deadline, processes.agreement()) as told,
                Watchdog(config.stall_patience, workdir.folder / "logs", stalled) as watchdog,
            ):
                loop = Loop(
                    train_steps=train_steps,
                    batches=batches,
                    saves=due.saves,
                    validate=Duty(due.validates, scored, functools.partial(score, validation, writer)),
                    draw=Duty(due.samples, drawn, functools.partial(draw_samples, pipeline, prompts, workdir, writer)),
                    checkpoints=checkpoints,
                    metadata=describe(config, identity, mesh),
                    progress=progress,
                    status=status,
                    stop=told,
                    watchdog=watchdog,
                    max_skipped_in_a_row=config.max_skipped_in_a_row,
                    diverged=functools.partial(diverged, step_function, feed.records, workdir.folder),
                )
                state = loop.run(state, range(start + 1, stop + 1))
    say(f"done: step {stop} of {config.total_steps}")
    return state


@contextlib.contextmanager
def offer_embedded() -> Iterator[None]:
    """Where encoders cannot be fetched, a new run has others to choose."""
    try:
        yield
    except FetchError as error:
        raise FetchError(
            f"{error}; the encoders that need no network: --config.vae=embedded --config.text_encoder=embedded"
        ) from error


def open_checkpoints(config: ConfigDict, workdir: Workdir, identity: dict[str, str], extend: bool) -> Checkpoints:
    """The checkpoints of a run, which is a new one or the same as before in config, data and encoders.

    The newest is verified; where it is damaged, it is set aside and the run goes on from the one before. Of several
    processes the first does both.
    """
    place, directory = workdir.place, workdir.checkpoints
    if is_export(workdir.folder / "config.json"):
        raise ConfigError(f"{place} is an export, not a run: give another --workdir (init_from={place} begins with it)")
    whole, damaged = newest_whole(directory, config.verify_checkpoints, ITEMS) if processes.is_first() else (None, [])
    step = processes.of_first(whole and whole.step)
    if step is not None:
        say(f"checkpoint: {whole}")
        take_over(config, workdir.folder, extend)
        refuse_another(restore_metadata(directory, step), identity)
    with writable(place):
        if processes.is_first():
            workdir.folder.mkdir(parents=True, exist_ok=True)
            for report in damaged:
                say(f"warning: checkpoint: {report}; set aside as {set_aside(directory, report.step)}")
            with tempfile.TemporaryFile(dir=workdir.folder):
                pass  # a folder that cannot be written to is told now, and not when the data are encoded
        best = Best(config.keep_best, functools.partial(figures, workdir.folder / "metrics.jsonl", NAME))
        return Checkpoints(directory, config.keep_latest, config.keep_every, best, before_commit=workdir.bring)


def describe(config: ConfigDict, identity: dict[str, str], mesh: Mesh) -> dict[str, Any]:
    """What a checkpoint says of itself beside its arrays; ``identity`` are the hashes of data and encoders."""
    versions = {name: version(name) for name in PACKAGES} | {"dit_jax": dit_jax.__version__, "git": git_commit()}
    return {**identity, "config": config.to_dict(), "versions": versions, "mesh": dict(mesh.shape)}


def refuse_another(saved: dict[str, str], found: dict[str, str]) -> None:
    """Raises ConfigError if a run would go on with other data or encoders than it began with."""
    changed = [name for name in found if saved.get(name) != found[name]]
    if changed:
        raise ConfigError(
            f"the run was begun with another {' and '.join(changed)} (compared by hash);"
            " name its own again or put the files back, or begin a new run in another --workdir"
        )


def banner(
    config: ConfigDict,
    workdir: Path,
    start: int,
    mesh: Mesh,
    records: int,
    held_out: int,
    encoders: Sequence[VAE | TextEncoder],
) -> None:
    """Say what runs, on what, with which data and encoders, and where it begins.

    ``records`` train and ``held_out`` validate.
    """
    packages = " ".join(f"{name} {version(name)}" for name in PACKAGES)
    say(f"dit_jax {dit_jax.__version__} ({git_commit()}), Python {platform.python_version()}, {packages}")
    say(f"devices: {mesh.size} x {jax.devices()[0].device_kind}, mesh {dict(mesh.shape)}")
    say(
        f"data: {config.data.source}, {records:,} records, {config.data.image_size} px"
        + (f", {held_out:,} others validate" if held_out else "")
    )
    for encoder in encoders:
        say(f"encoder: {encoder.name} sha256 {encoder.sha256[:12]}")
    say(f"workdir: {workdir}, " + (f"resuming from step {start}" if start else "a new run"))


def make_writer(config: ConfigDict, workdir: Path, start: int, watch: Watch | None) -> Writer:
    """Where the numbers of this process go."""
    if not processes.is_first():
        return Silent()
    return Writer(workdir, start, config.wandb_project, config.to_dict(), watch)


def make_progress(config: ConfigDict, writer: Writer, start: int, flops: int, mesh: Mesh) -> Progress:
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


def say(line: str) -> None:
    """A line for the person who watches, at once."""
    print(line, flush=True)
