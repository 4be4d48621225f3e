"""Grids: at which times a sampler asks the network.

Every grid falls from t = 1 to t = 0 in n steps; there, sigma is 0 and the sampler returns x0.

    uniform     t_i = 1 - i / n, moved by the schedule's own shift                     (1)
    trailing    eq. 1 rounded to the T points that a discrete model is trained at
                (Lin et al. 2023, table 2)                                             (2)
    shifted     eq. 1 with a shift of its own, eq. 12 of `dit_jax.diffusion.schedules`:
                above 1 more steps near the noise, below 1 more near the picture       (3)
    karras      r_i = (r_0^(1 / rho) + i / (n - 1) (r_(n-1)^(1 / rho) - r_0^(1 / rho)))^rho
                for i < n, with r = sigma / alpha from its largest value to that of the
                first step of training (Karras et al. 2022, eq. 5)                     (4)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.schedules import Schedule, T, VariancePreserving, shift_times


def uniform(schedule: Schedule, steps: int) -> np.ndarray:
    """Eq. 1."""
    return np.asarray(schedule.shift_times(np.linspace(1.0, 0.0, steps + 1)), np.float32)


def trailing(schedule: Schedule, steps: int) -> np.ndarray:
    """Eq. 2. ValueError if there are more steps than points."""
    if steps > T:
        raise ValueError(f"{steps} steps: a trailing grid has at most {T}")
    points = np.round(np.linspace(T, 0, steps + 1)) / T
    return np.asarray(schedule.shift_times(points), np.float32)


def shifted(steps: int, shift: float) -> np.ndarray:
    """Eq. 3. ValueError unless shift is above 0."""
    if not shift > 0:
        raise ValueError(f"the shift of a grid must be above 0, not {shift}; 1 leaves it even")
    return np.asarray(shift_times(np.linspace(1.0, 0.0, steps + 1), shift), np.float32)


def karras(schedule: Schedule, steps: int, rho: float) -> np.ndarray:
    """Eq. 4. ValueError where r has no largest value, as on rectified flow, or unless rho is above 0."""
    if not isinstance(schedule, VariancePreserving):
        raise ValueError(
            f"schedule {schedule.name!r} has pure noise at t = 1, where a karras grid cannot start; shifted"
        )
    if not rho > 0:
        raise ValueError(f"rho of a karras grid must be above 0, not {rho}")
    with jax.ensure_compile_time_eval():  # a grid may be made inside a jit
        ends = np.asarray([schedule.first, 1.0], np.float32)
        least, most = np.asarray(schedule.ratio_and_slope(jnp.asarray(ends))[0], np.float64) ** (1 / rho)
        ratio = np.linspace(most, least, steps) ** rho  # (4)
        t = np.asarray(schedule.time_of(jnp.asarray(-2 * np.log(ratio))), np.float32)
    return np.concatenate([[1.0], np.maximum(t[1:], schedule.first), [0.0]]).astype(np.float32)


def make_grid(name: str, schedule: Schedule, steps: int, shift: float, rho: float) -> np.ndarray:
    """The grid called name.

    Args:
      name: a key of ``GRIDS``.
      schedule: of the model.
      steps: n, 1 or more.
      shift: of eq. 3; only ``shifted`` reads it.
      rho: of eq. 4; only ``karras`` reads it.

    Returns:
      float32 ``[steps + 1]``, falling from 1 to 0.

    Raises:
      ValueError: the name is unknown, or this grid cannot be had.
    """
    if name not in GRIDS:
        raise ValueError(f"unknown grid {name!r}; choose one of {', '.join(GRIDS)}")
    return GRIDS[name](schedule, steps, shift, rho)


GRIDS: dict[str, Callable[[Schedule, int, float, float], np.ndarray]] = {
    "uniform": lambda schedule, steps, shift, rho: uniform(schedule, steps),
    "trailing": lambda schedule, steps, shift, rho: trailing(schedule, steps),
    "shifted": lambda schedule, steps, shift, rho: shifted(steps, shift),
    "karras": lambda schedule, steps, shift, rho: karras(schedule, steps, rho),
}
