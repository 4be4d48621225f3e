"""Checkpoints: the only file that knows Orbax.

``<workdir>/checkpoints/<step>/`` holds the items ``params``, ``ema``, ``optimizer`` and ``metadata`` (JSON). Saving
is asynchronous and atomic: a step directory appears by a rename when everything is written, so a step that can be
seen is whole. `Checkpoints.committed` reports a save only then.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from dit_jax.errors import CheckpointError
from dit_jax.training.state import TrainState

SHOWN = 300  # characters of what Orbax says of a checkpoint that does not fit
ITEMS = ("params", "ema", "optimizer", "metadata")


class Commit(NamedTuple):
    """A save that is on disk: its step, bytes, and the seconds from the request to the commit."""

    step: int
    bytes: int
    seconds: float

    def __str__(self) -> str:
        return f"step={self.step} {self.bytes / 2**30:.2f}GiB {self.seconds:.1f}s"


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: ``<workdir>/checkpoints``.
      keep_latest: how many of the newest are kept.
      keep_every: steps divisible by this are kept for good; 0 for none.
    """

    def __init__(self, directory: Path, keep_latest: int, keep_every: int):
        self.directory = directory.absolute()
        # the whole policy is written out: Orbax drops recency when only a part of it is given
        policies: list[Any] = [LatestN(keep_latest), *([EveryNSteps(keep_every)] if keep_every else [])]
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_names=ITEMS,
            options=ocp.CheckpointManagerOptions(preservation_policy=AnyPreservationPolicy(policies)),
        )
        self._pending: tuple[int, float] | None = None

    def latest_step(self) -> int | None:
        """The newest step on disk, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, metadata: dict[str, Any]) -> Commit | None:
        """Queue a save of the state under its own step.

        Waits for an earlier save that is still being written, and returns its commit.
        """
        self.wait()
        earlier = self.committed()
        step = int(state.step)
        self._pending = (step, time.monotonic())
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                ema=ocp.args.StandardSave(state.ema),
                optimizer=ocp.args.StandardSave(_optimizer_item(state)),
                metadata=ocp.args.JsonSave(metadata),
            ),
        )
        return earlier

    def committed(self) -> Commit | None:
        """The save that was committed since the last call, if any; does not wait."""
        if self._pending is None or self._manager.is_saving_in_progress():
            return None
        self._manager.wait_until_finished()  # raises what the writing thread raised
        (step, started), self._pending = self._pending, None
        path = self.directory / str(step)
        if not path.is_dir():
            raise CheckpointError(f"the save of step {step} did not arrive at {path}")
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        return Commit(step, size, time.monotonic() - started)

    def wait(self) -> None:
        """Return when nothing is being written; raises what a save in the background raised."""
        self._manager.wait_until_finished()

    def restore(self, step: int, state: TrainState) -> TrainState:
        """The state at a step; ``state`` says structure, shapes, dtypes and shardings.

        Raises:
          CheckpointError: if the step is missing, unreadable, or of another model.
        """

        with _readable(self.directory / str(step)):
            items = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=_wanted(state.params),
                    ema=_wanted(state.ema),
                    optimizer=_wanted(_optimizer_item(state)),
                ),
            )
        return TrainState(params=items["params"], ema=items["ema"], **items["optimizer"])

    def close(self) -> None:
        """Wait for what is being written and release the directory."""
        self._manager.close()


def restore_metadata(directory: Path, step: int) -> dict[str, Any]:
    """What was saved as JSON with a step.

    Raises:
      CheckpointError: if the step is unreadable.
    """
    return _restore_item(directory, step, "metadata", ocp.args.JsonRestore())


def restore_params(directory: Path, step: int, item: str, shapes: Any) -> Any:
    """Only the parameters of a step: ``item`` is ``ema`` or ``params``; ``shapes`` says shapes, dtypes, shardings.

    Raises:
      CheckpointError: if the step is unreadable or of another model.
    """
    return _restore_item(directory, step, item, _wanted(shapes))


def save_tree(path: Path, tree: Any) -> None:
    """Write a tree of arrays by itself, and wait until it is there."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), tree)


def restore_tree(path: Path, shapes: Any) -> Any:
    """What `save_tree` wrote, in the types and shardings of ``shapes``.

    Raises:
      CheckpointError: if it is unreadable or of another model.
    """
    with _readable(path), ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path.absolute(), jax.tree.map(ocp.utils.to_shape_dtype_struct, shapes))


def _restore_item(directory: Path, step: int, item: str, args: Any) -> Any:
    options = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
    with (
        _readable(directory / str(step)),
        ocp.CheckpointManager(directory.absolute(), item_names=ITEMS, options=options) as manager,
    ):
        return manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    """All of a state but the parameters and their average, which can be restored alone."""
    return {"step": state.step, "opt_state": state.opt_state, "loss_scale": state.loss_scale}


def _wanted(tree: Any) -> ocp.args.StandardRestore:
    return ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, tree))


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())[:SHOWN] or type(error).__name__
        raise CheckpointError(f"cannot restore {path}: {reason}") from error


def find_step(directory: Path, step: int | None) -> int:
    """The step to load from ``<workdir>/checkpoints``: the one asked for, or the newest.

    Raises:
      CheckpointError: if it is not there; a missing checkpoint is never a fresh start.
    """
    steps: Sequence[int] = sorted(int(p.name) for p in directory.glob("*") if p.name.isdigit())
    if not steps:
        raise CheckpointError(f"no checkpoint in {directory}: train first, or name another run")
    if step is None:
        return steps[-1]
    if step not in steps:
        raise CheckpointError(f"no checkpoint of step {step} in {directory}; there are {', '.join(map(str, steps))}")
    return step
