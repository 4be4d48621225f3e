"""The validation loss: how well a network removes noise from records that it was never trained on.

For record i with latents x0, the mean of the VAE's posterior, and text y, at every level l_k = -5, -4, ..., 7 of the
logarithm of the signal-to-noise ratio:

    t_k = the time at which the schedule's log_snr is l_k                                  (1)
    x_t = alpha(t_k) x0 + sigma(t_k) epsilon,    epsilon from fold_in(fold_in(key, i), k)  (2)
    e_k = mean over i, h, w, C of (x0_hat - x0)^2,    x0_hat read from DiT(x_t, t_k, y)    (3)
    e   = mean over k of e_k                                                               (4)

In (2) i is the record's place among those that validate and ``key`` is a constant, not the run's seed: every run on the
same records is asked the same questions. At one signal-to-noise ratio all schedules give the same x_t but for its
scale, and what a network predicts is read as x0, so that (3) compares objectives and schedules. A perfect network has
e_k = E Var(x0 | x_t), the least that there is, and one that knows nothing of its input E Var(x0), about 1.

No caption is dropped, nothing is guided, dropout is off. A record counts as one, whatever its shape.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dit_jax import processes
from dit_jax.arrays import Array, TextStates
from dit_jax.data.cache.gather import Cache
from dit_jax.diffusion.process import Process
from dit_jax.models.dit import DiT
from dit_jax.sharding import put_batch, replicated

LOG_SNRS = tuple(range(-5, 8))  # nearly all noise to nearly none; every schedule reaches them
NOISE_SEED = 0  # of the key of (2)
NAME = "validation_x0_error"  # in a row of metrics.jsonl

Predict = Callable[[Array, Array], Array]  # (x_t [B, h, w, C], t [B]) -> [B, h, w, C_out]


class Chunk(NamedTuple):
    """Records that are scored at a time, of which a process hands in its rows.

    Attributes:
      batch: these rows of an encoded batch (see `dit_jax.arrays`).
      places: int32, i of equation (2) of each.
      good: how many records of the whole batch count; what is behind fills it up.
    """

    batch: dict[str, np.ndarray]
    places: np.ndarray
    good: int


def chunks(records: Cache, size: int, rows: range) -> Iterator[Chunk]:
    """These rows of all good records with their first captions, shape by shape, ``size`` at a time."""
    for bucket in np.unique(records.bucket):
        places = np.flatnonzero((records.bucket == bucket) & ~records.bad)
        for first in range(0, len(places), size):
            some = places[first : first + size]
            filled = np.append(some, np.full(size - len(some), some[-1]))
            mine = filled[rows.start : rows.stop]
            batch = records.gather(mine, np.zeros(len(mine), np.uint64), np.zeros(len(mine), bool))
            yield Chunk(batch, mine.astype(np.int32), len(some))


def x0_errors(predict: Predict, process: Process, x0: Array, places: Array) -> Array:
    """The terms of equation (3): float32 ``[K, B]``, the mean over pixels and channels at every level.

    Args:
      predict: a network that has its text.
      process: its schedule, and what it predicts.
      x0: model latents, float32 ``[B, h, w, C]``.
      places: int32 ``[B]``, i of equation (2).
    """
    B, *_, C = x0.shape
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(NOISE_SEED), places)

    def at_level(level: tuple[Array, Array]) -> Array:
        k, log_snr = level
        t = process.schedule.time_of(jnp.full(B, log_snr))  # (1)
        x_t, _ = process.corrupt(jax.vmap(jax.random.fold_in, (0, None))(keys, k), x0, t)  # (2)
        prediction, _ = process.split(predict(x_t, t), C)
        return jnp.square(process.convert(prediction, x_t, t).x0 - x0).mean((1, 2, 3))

    return jax.lax.map(at_level, (jnp.arange(len(LOG_SNRS)), jnp.asarray(LOG_SNRS, jnp.float32)))


@dataclass(frozen=True)
class Validation:
    """Scores parameters: ``validation(params)`` is e_k of every level, float64 ``[K]``.

    Attributes:
      model: predicts from ``(x_t, t, text)``.
      process: its schedule, and what it predicts.
      to_model_latents: raw latents -> latents of about unit variance.
      records: encoded; those that are bad do not count.
      batch_size: records that are scored at a time; a multiple of the devices. It changes no figure.
      mesh: of the devices; parameters lie on all of them.
    """

    model: DiT
    process: Process
    to_model_latents: Callable[[Array], Array]
    records: Cache
    batch_size: int
    mesh: Mesh

    def __len__(self) -> int:
        return int((~self.records.bad).sum())

    def __call__(self, params: Any) -> np.ndarray:
        errors = []
        rows = processes.own_rows(self.batch_size)
        for batch, places, good in chunks(self.records, self.batch_size, rows):
            on_devices = put_batch({**batch, "places": places}, self.mesh)
            errors.append(np.asarray(self._errors(params, on_devices), np.float64)[:, :good])
        return np.concatenate(errors, axis=1).mean(1)

    @functools.cached_property
    def _errors(self) -> Callable[[Any, dict[str, Array]], Array]:
        """Jitted, and compiled for every shape of pictures once: parameters and a batch -> float32 ``[K, B]``."""

        def errors(params: Any, batch: dict[str, Array]) -> Array:
            mean, hidden, pooled = (batch[key].astype(jnp.float32) for key in ("mean", "hidden", "pooled"))
            variables = {"params": params}
            text = self.model.apply(variables, TextStates(hidden, pooled, batch["mask"]), method="prepare_text")

            def predict(x_t: Array, t: Array) -> Array:
                return self.model.apply(variables, x_t, t, text, False, method="predict")

            return x0_errors(predict, self.process, self.to_model_latents(mean), batch["places"])

        return jax.jit(errors, out_shardings=replicated(self.mesh))  # every process sees all of them


def as_row(errors: np.ndarray) -> dict[str, float]:
    """Equation (4) and e_k ``[K]`` by the names that they have in ``metrics.jsonl``."""
    levels = {f"{NAME}/log_snr={level}": float(e) for level, e in zip(LOG_SNRS, errors, strict=True)}
    return {NAME: float(errors.mean()), **levels}


def in_words(errors: np.ndarray) -> str:
    """The same for a person: the mean, and the levels at both ends and in the middle."""
    shown = ", ".join(f"{LOG_SNRS[k]}: {errors[k]:.4f}" for k in (0, len(LOG_SNRS) // 2, -1))
    return f"x0_error={errors.mean():.4f} (log-SNR {shown})"
