"""Saves and restores the arrays of checkpoints: the only file that knows Orbax.

Saving is asynchronous and atomic. A step is written, then all of its files are hashed into its manifest, then it is
committed: by a rename, or in a bucket by one file more. A step that counts is whole, and its manifest says so for as
long as it lies there. `Checkpoints.committed` reports a save only when that was done, and looked at.

What lies there, and which of it can be used, is for `dit_jax.training.saved_steps`. Orbax notices no flipped bit, and
casts without a word, so that shapes and types of all arrays are compared here.
"""

import contextlib
import errno
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from dit_jax import processes, stores
from dit_jax.errors import CheckpointError, FetchError, UserError, WorkdirError
from dit_jax.training import formats, manifest
from dit_jax.training.saved_steps import (
    FORMAT,
    ITEMS,
    half_deleted,
    restore_metadata,
    steps_of,
    unfinished,
    verify,
)
from dit_jax.training.state import TrainState
from dit_jax.trees import mismatches, named_leaves

SHOWN = 300  # characters of what Orbax says of a checkpoint that does not fit
LISTED = 8  # leaves that are named one by one
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room, no quota left, no larger file allowed


class Commit(NamedTuple):
    """A save that is on disk: its step, bytes, the seconds from the request to the commit, and those of hashing."""

    step: int
    bytes: int
    seconds: float
    hashing: float

    def __str__(self) -> str:
        return f"step={self.step} {self.bytes / 2**30:.2f}GiB {self.seconds:.1f}s (sha256 {self.hashing:.1f}s)"


class Best(NamedTuple):
    """A policy of Orbax: the checkpoints with the lowest error stay.

    Orbax has one of its own, which keeps the errors in a file of the step. They are in ``metrics.jsonl`` already, also
    those of before.

    Attributes:
      keep: how many.
      errors: by step, of those that were validated, as they are when it is called.
    """

    keep: int
    errors: Callable[[], Mapping[int, float]]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """For every checkpoint that there is whether it stays."""
        best = self.of([info.step for info in checkpoints])
        return [info.step in best for info in checkpoints]

    def of(self, steps: Sequence[int]) -> set[int]:
        """The best of some steps."""
        errors = self.errors()
        scored = sorted((errors[step], step) for step in steps if step in errors)
        return {step for _, step in scored[: self.keep]}


NO_BEST = Best(0, dict)


class Checkpoints:
    """The checkpoints of one run, to which it saves; nobody else writes there.

    What an earlier process did not finish is removed: a save, or the deletion of a step that need not be kept.

    Args:
      directory: ``<workdir>/checkpoints``.
      keep_latest: how many of the newest are kept.
      keep_every: steps divisible by this are kept for good; 0 for none.
      best: which of those that were validated are kept; they go when there are better ones.
      before_commit: called when a step is written and does not count yet, in a thread of its own.
    """

    def __init__(
        self,
        directory: Path,
        keep_latest: int,
        keep_every: int,
        best: Best = NO_BEST,
        before_commit: Callable[[], None] = lambda: None,
    ):
        self.directory = stores.absolute(directory)
        self._before_commit = before_commit
        if processes.is_first():
            for left in [*unfinished(self.directory), *half_deleted(self.directory, keep_latest, keep_every, best.of)]:
                stores.remove(left)
        processes.barrier()
        # the whole policy is written out: Orbax drops recency when only a part of it is given
        policies: list[Any] = [LatestN(keep_latest), *([EveryNSteps(keep_every)] if keep_every else []), best]
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_names=ITEMS,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(policies),
                async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_manifest),
            ),
        )
        self._pending: tuple[int, float] | None = None
        self._hashing = 0.0

    def save(self, state: TrainState, metadata: dict[str, Any]) -> Commit | None:
        """Queue a save of the state under its own step.

        Waits for an earlier save that is still being written, and returns its commit.

        Args:
          state: what is saved.
          metadata: what else is to be known of it, as JSON can say it.

        Raises:
          WorkdirError: the earlier save did not arrive.
        """
        self.wait()
        earlier = self.committed()
        step = int(state.step)
        self._pending = (step, time.monotonic())
        with self._loud():
            queued = self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    ema=ocp.args.StandardSave(state.ema),
                    optimizer=ocp.args.StandardSave(_optimizer_item(state)),
                    metadata=ocp.args.JsonSave({**metadata, "format": FORMAT, "step": step}),
                ),
            )
        assert queued, f"there is a newer step than {step} in {self.directory}"
        return earlier

    def committed(self) -> Commit | None:
        """The save that was committed since the last call, if any; does not wait.

        Of several processes the first looks and tells.

        Raises:
          WorkdirError: it did not arrive.
        """
        if self._pending is None or self._manager.is_saving_in_progress():
            return None
        self.wait()
        (step, started), self._pending = self._pending, None
        if not processes.is_first():
            return None
        path = self.directory / str(step)
        problems = manifest.verify(path, "fast", ITEMS).problems
        if problems:
            raise WorkdirError(f"the save of step {step} did not arrive: {problems[0]}; {self._goes_on()}")
        size = sum(stores.files_of(path).values())
        return Commit(step, size, time.monotonic() - started, self._hashing)

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
          WorkdirError: what was being written did not arrive.
        """
        with self._loud():
            self._manager.wait_until_finished()

    def restore(self, step: int, state: TrainState) -> TrainState:
        """The state at a step, of whatever format; ``state`` says structure, shapes, dtypes and shardings.

        Raises:
          CheckpointError: if the step is missing, unreadable, or of another model.
        """
        wanted = {"params": state.params, "ema": state.ema, "optimizer": _optimizer_item(state)}
        trees = restore_trees(self.directory, step, wanted)
        return TrainState(params=trees["params"], ema=trees["ema"], **trees["optimizer"])

    def close(self) -> None:
        """Wait for what is being written and release the directory."""
        with self._loud():
            self._manager.close()

    @contextlib.contextmanager
    def room(self) -> Iterator[None]:
        """Where the disk turns out to be full, say what the run goes on from.

        Raises:
          WorkdirError: an OSError of a full disk, in other words.
        """
        try:
            yield
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise WorkdirError(f"{_system_reason(error)}; {self._goes_on()}") from error

    @contextlib.contextmanager
    def _loud(self) -> Iterator[None]:
        """A failure of the system in a save, which Orbax raises when it is waited for, is an error of the workdir.

        Whatever happens on the way to a bucket is one of the network: every library there has errors of its own.
        """
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            pending, self._pending = self._pending, None
            what = f"the save of step {pending[0]}" if pending else "saving"
            if stores.in_bucket(self.directory):
                reason = " ".join(str(error).split())[:SHOWN] or type(error).__name__
                raise FetchError(f"{what} failed: {reason}; start again: the run goes on {self._from()}") from error
            if (said := _system_reason(error)) is None:
                raise
            raise WorkdirError(f"{what} failed: {said}; {self._goes_on()}") from error

    def _goes_on(self) -> str:
        return f"make room in {self.directory}, or make it writable, and start again: the run goes on {self._from()}"

    def _from(self) -> str:
        whole = [step for step in steps_of(self.directory) if not verify(self.directory, step, "fast", ITEMS).problems]
        return f"from step {whole[-1]}, the last that is saved" if whole else "from the beginning"

    def _write_manifest(self) -> None:
        """Orbax calls this in its thread when a step is written and not committed yet."""
        (growing,) = unfinished(self.directory)
        self._hashing = manifest.write(growing, ITEMS)
        self._before_commit()


# ----------------------------------------------------------------------------------------------------- what is in it


def restore_trees(directory: Path, step: int, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Trees of a step, of whatever format, by name; ``shapes`` are today's, with shardings.

    Raises:
      CheckpointError: one is unreadable, or of another model, each leaf by name.
    """

    def read(shapes: Mapping[str, Any]) -> dict[str, Any]:
        return {name: _restore(directory / str(step) / name, tree, same_types=True) for name, tree in shapes.items()}

    return formats.restore(dict(shapes), restore_metadata(directory, step).get("format", 0), read)


def save_tree(path: Path, tree: Any) -> None:
    """Write a tree of arrays by itself, and wait until it is there."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(stores.absolute(path), tree)


def restore_tree(path: Path, shapes: Any) -> Any:
    """What `save_tree` wrote, cast to the types of ``shapes`` and in its shardings.

    Raises:
      CheckpointError: it is unreadable, or of another model, each leaf by name.
    """
    return _restore(path, shapes, same_types=False)


def _restore(path: Path, shapes: Any, same_types: bool) -> Any:
    wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, shapes)
    with _readable(path), ocp.StandardCheckpointer() as checkpointer:
        written = checkpointer.metadata(stores.absolute(path)).item_metadata
        if written is None:
            raise CheckpointError(f"cannot restore {path}: it is not there, or does not say what is in it")
        found = named_leaves(written.tree)
        expected = named_leaves(wanted)
        wrong = mismatches({name: leaf.shape for name, leaf in found.items()}, expected)
        wrong += [
            f"{name} is {found[name].dtype}, expected {leaf.dtype}"
            for name, leaf in expected.items()
            if same_types and name in found and found[name].dtype != leaf.dtype
        ]
        if wrong:
            more = [f"and {len(wrong) - LISTED} more"] if len(wrong) > LISTED else []
            raise CheckpointError(
                "\n  ".join([f"cannot restore {path}: it is of another model", *wrong[:LISTED], *more])
            )
        return checkpointer.restore(stores.absolute(path), wanted)


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    """All of a state but the parameters and their average, which can be restored alone."""
    return {name: getattr(state, name) for name in ("step", "opt_state", "loss_scale", "skips")}


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # Orbax lets out whatever it trips over, now and then a bare Exception
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        reason = " ".join(str(error).split())[:SHOWN] or type(error).__name__
        raise CheckpointError(f"cannot restore {path}: {reason}") from error


def _system_reason(error: Exception) -> str | None:
    """What the system said in an error of its own or of tensorstore, which quotes it; None if it said nothing."""
    if isinstance(error, OSError):
        return error.strerror or " ".join(str(error).split())
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else None
