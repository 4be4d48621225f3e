"""AdamW with linear warm-up, cosine or constant decay, and clipping by the global norm."""

from typing import Any

import optax

from dit_jax.trees import mask_by_name

SCHEDULES = ("cosine", "constant")


def learning_rate_schedule(name: str, peak: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """The learning rate at a step: up from 0 to ``peak`` in ``warmup_steps``, then by ``name`` to the end.

    Raises:
      ValueError: if ``name`` is not in `SCHEDULES`.
    """
    if name == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, total_steps)
    if name == "constant":
        return optax.join_schedules(
            [optax.linear_schedule(0.0, peak, warmup_steps), optax.constant_schedule(peak)], [warmup_steps]
        )
    raise ValueError(f"learning_rate_schedule is {name!r}; it can be {', '.join(SCHEDULES)}")


def make_optimizer(
    schedule: optax.Schedule, b1: float, b2: float, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) behind clipping; only kernels decay, not biases, positions or null text."""

    def kernels(params: Any) -> Any:
        return mask_by_name(params, lambda name: name.endswith("/kernel"))

    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=kernels),
    )
