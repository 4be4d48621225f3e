"""The loop of a run: takes the steps and does beside them what is due, until the last one or until it is to stop.

    step n  ->  diverged?  ->  validate  ->  save  ->  draw samples  ->  told to stop?  ->  step n + 1

What came of step n is looked at when step n + 1 is on its way, so that the device never waits for the host; only where
one more bad step would be too many, and for what is due, it is waited for.

What is due at a step belongs to it: a process that goes on from step n first does what is missing of step n. A run that
was stopped, or killed, in the middle of it leaves the same files as one that was not.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax

from dit_jax.training.checkpoint import Checkpoints, Commit
from dit_jax.training.progress import Progress
from dit_jax.training.state import TrainState
from dit_jax.training.status import Status
from dit_jax.training.stop import Stop
from dit_jax.training.watchdog import Watchdog

Batch = dict[str, jax.Array]


@dataclass(frozen=True)
class Duty:
    """When something is due that a run does beside its steps.

    Attributes:
      every: so many steps; 0 is never.
      last: the last step of the run, where it is due too.
      performed: whether it was done at a step, perhaps by an earlier process.
    """

    every: int
    last: int
    performed: Callable[[int], bool]

    def due(self, step: int) -> bool:
        """Whether it belongs to a step."""
        return self.every > 0 and (step == self.last or is_multiple(step, self.every))

    def owed(self, step: int) -> bool:
        """Whether it belongs to a step and was not done."""
        return step > 0 and self.due(step) and not self.performed(step)


@dataclass(frozen=True)
class Loop:
    """What the steps of a run are taken with; `run` takes them.

    Attributes:
      train_steps: by the latent grid of a batch; state and batch -> state and metrics.
      batches: one a step, on the devices.
      save_every: steps; 0 saves only where the run ends.
      validation, samples: when these are due.
      validate, draw: parameters and step -> what to say of it.
      checkpoints: where the state is saved.
      metadata: saved with every checkpoint.
      progress, status: what is said of the run.
      stop: when it is told to end.
      watchdog: when it stands still.
      max_skipped_in_a_row: so many steps whose loss or gradient is not finite end the run.
      diverged: the state before a bad step, its batch, the step and its metrics -> what is raised.
    """

    train_steps: Mapping[tuple[int, ...], Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]]
    batches: Iterator[Batch]
    save_every: int
    validation: Duty
    samples: Duty
    validate: Callable[[Any, int], str]
    draw: Callable[[Any, int], str]
    checkpoints: Checkpoints
    metadata: dict[str, Any]
    progress: Progress
    status: Status
    stop: Stop
    watchdog: Watchdog
    max_skipped_in_a_row: int
    diverged: Callable[[TrainState, Batch, int, dict[str, jax.Array]], Exception]

    def run(self, state: TrainState, steps: range) -> TrainState:
        """Take these steps; ``state`` is that after the step before the first.

        Returns:
          The state after the last step, which is saved and on disk.

        Raises:
          KeyboardInterrupt, PreemptedError: it was told to stop; the state is saved and on disk.
          DivergedError: too many bad steps in a row; none of them is saved.
          WorkdirError: a save did not arrive.
        """
        self.progress.restart()
        step = steps.start - 1
        for duty, perform in ((self.validation, self.validate), (self.samples, self.draw)):
            if duty.owed(step):
                self._perform(perform, state, step)
        if self._owes(step):  # a signal broke it off; who goes on from a later step would not look for it
            self.stop.end(step)
        for step in steps:
            state = self._step(state, step)
            if self.validation.due(step):  # before it is saved: how good a step is decides how long it is kept
                self._perform(self.validate, state, step)
            saved = step == steps[-1] or (is_multiple(step, self.save_every) and not self._was_skipped(step))
            if saved:
                self._save(state, step)
            if self.samples.due(step):
                self._perform(self.draw, state, step)
            self._report(self.checkpoints.committed())
            if self.stop.agreed():
                if not saved:
                    self._save(state, step)
                break
        with self._aside():
            self.checkpoints.wait()
        self._report(self.checkpoints.committed())
        stopped_early, broken_off = step + 1 < steps.stop, self._owes(step)
        if stopped_early or broken_off:
            self.stop.end(step)
        return state

    def _owes(self, step: int) -> bool:
        return self.validation.owed(step) or self.samples.owed(step)

    def _step(self, state: TrainState, step: int) -> TrainState:
        self.watchdog.begin(step)
        with self.progress.waiting(), self.watchdog.resting():
            batch = next(self.batches)
        state, metrics = self.train_steps[batch["mean"].shape[1:3]](state, batch)
        self.progress.step(step, metrics)
        if self.progress.skipped_in_a_row >= self.max_skipped_in_a_row - 1:  # this step may be the last
            self.progress.flush()
        if self.progress.skipped_in_a_row >= self.max_skipped_in_a_row:
            before = replace(state, step=state.step - 1)  # nothing else has changed
            with self._aside():
                raise self.diverged(before, batch, step, metrics)
        self.status.done(step, self.progress.productive)
        return state

    def _perform(self, perform: Callable[[Any, int], str], state: TrainState, step: int) -> None:
        """Do what belongs to a step; a signal breaks it off."""
        with self._aside():
            said = self.stop.unless_told(lambda: perform(state.ema, step))
            if said is not None:
                self.progress.say(said)

    def _was_skipped(self, step: int) -> bool:
        """Whether a step is one of a row of bad ones, and say so; it need not be saved, and an older one go for it."""
        self.progress.flush()
        if self.progress.skipped_in_a_row:
            self.progress.say(f"step={step} was skipped and is not saved: its state is that of the step before")
        return self.progress.skipped_in_a_row > 0

    def _save(self, state: TrainState, step: int) -> None:
        with self._aside():
            seconds = self.status.done(step, self.progress.productive)
            self._report(self.checkpoints.save(state, {**self.metadata, "productive_seconds": seconds}))
            self.progress.say(f"saving step={step}")

    def _report(self, commit: Commit | None) -> None:
        if commit:
            self.progress.say(f"saved {commit}")
            self.status.saved(commit.step)

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Time that is not training; every step before it has ended."""
        with self.progress.aside(), self.watchdog.resting():
            yield


def is_multiple(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens at this one."""
    return every > 0 and step % every == 0
