"""The train step: one jitted function from (state, batch) to (state, metrics).

For sample k of the run (``k = step * B + i``, contract 6 of the architecture) with latents x0 and text y:

    x0  = normalise(mean + std * noise_0)                     a sample of the VAE's posterior
    y   = null caption with probability ``caption_dropout``
    x_t = alpha(t) x0 + sigma(t) noise                        t drawn by the objective
    loss = mean over the batch of loss(DiT(x_t, t, y), target), with a learned variance also of its share of the bound

All four draws of sample k come from ``fold_in(key, k)``: neither the number of devices nor gradient accumulation
changes them. Dropout inside the network draws from the step and the accumulation slice.

With gradient g, step n and learning rate r(n):

    theta <- theta + r(n) . optimizer(g, theta)
    ema   <- d ema + (1 - d) theta                            d = min(ema_decay, (1 + n) / (10 + n))

A step whose loss or gradient is not finite is skipped (`dit_jax.training.skips`): it changes nothing of theta, ema and
optimizer, and n goes on. In float16 the loss is scaled (`dit_jax.training.loss_scale`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dit_jax.arrays import Array, TextStates
from dit_jax.diffusion import objectives
from dit_jax.diffusion.process import Process
from dit_jax.models.dit import DiT
from dit_jax.training.state import TrainState

Batch = dict[str, Array]


@dataclass(frozen=True)
class TrainStep:
    """What one step is made of; `compile` makes it run, and so does ``jax.jit(TrainStep(...), donate_argnums=0)``.

    Attributes:
      model: predicts from ``(x_t, t, text)``.
      process: corrupts latents and knows what the prediction means.
      sample_times: keys ``[B]`` and places ``[B]`` -> times ``[B]``.
      weight: times ``[B]`` -> weights of the loss; None weighs all times alike.
      variance_weight: of the loss that trains a learned variance, where the model has one.
      to_model_latents: raw latents -> latents of about unit variance.
      optimizer: gradients to updates for a learning rate of 1.
      learning_rate: global step -> what the updates are multiplied by.
      caption_dropout: probability that a caption is replaced by the null caption.
      ema_decay: of the moving average; the first steps use ``(1 + step) / (10 + step)`` where that is smaller.
      accumulate: into how many slices the batch is cut; the loss is the same for every value but for
        the draws of dropout.
      seed: of all randomness.
    """

    model: DiT
    process: Process
    sample_times: objectives.Times
    weight: objectives.Weight | None
    variance_weight: float
    to_model_latents: Callable[[Array], Array]
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    caption_dropout: float
    ema_decay: float
    accumulate: int
    seed: int

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        """One update. ``batch`` is an encoded batch (see `dit_jax.arrays`); metrics are scalars."""
        loss, grads = self.loss_and_gradient(state, batch)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        learning_rate = jnp.asarray(self.learning_rate(state.step), jnp.float32)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p + learning_rate * u, state.params, updates)
        n = state.step.astype(jnp.float32)
        decay = jnp.minimum(self.ema_decay, (1.0 + n) / (10.0 + n))
        ema = jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), state.ema, params)

        before = (state.params, state.ema, state.opt_state)
        params, ema, opt_state = jax.tree.map(
            lambda after, before: jnp.where(finite, after, before), (params, ema, opt_state), before
        )
        overflow = state.loss_scale.overflows(finite) if self.float16 else jnp.bool_(False)
        skips = state.skips.count(finite, overflow)
        loss_scale = state.loss_scale.adjust(finite) if self.float16 else state.loss_scale
        metrics = {"loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate}
        metrics |= {"loss_scale": state.loss_scale.scale} if self.float16 else {}
        metrics |= {"skipped": skips.total, "skipped_in_a_row": skips.in_a_row}
        return TrainState(state.step + 1, params, ema, opt_state, loss_scale, skips), metrics

    @property
    def float16(self) -> bool:
        """Whether the loss is scaled."""
        return jnp.dtype(self.model.dtype) == jnp.float16

    def loss_and_gradient(self, state: TrainState, batch: Batch) -> tuple[Array, Any]:
        """The loss of a step, float32 scalar, and its gradient, like the parameters; both without the loss scale."""
        B = batch["mean"].shape[0]
        key_samples, key_dropout = jax.random.split(jax.random.key(self.seed))
        k = state.step.astype(jnp.uint32) * B + jnp.arange(B, dtype=jnp.uint32)  # wraps after 4e9 samples
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key_samples, k)
        dropout_keys = jax.random.split(jax.random.fold_in(key_dropout, state.step), self.accumulate)

        scale = state.loss_scale.scale if self.float16 else 1.0
        loss_and_grad = jax.value_and_grad(lambda *args: scale * self.loss(*args))
        A = self.accumulate  # slice a holds every sample with i % A == a, so that each slice lies on all devices
        places = jnp.arange(B, dtype=jnp.float32) / B
        slices = jax.tree.map(lambda x: x.reshape(B // A, A, *x.shape[1:]).swapaxes(0, 1), (batch, keys, places))

        def add_slice(total, part):
            (batch, keys, places), dropout_key = part
            return jax.tree.map(jnp.add, total, loss_and_grad(state.params, batch, keys, places, dropout_key)), None

        total = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
        if self.accumulate == 1:
            total, _ = add_slice(total, jax.tree.map(lambda a: a[0], (slices, dropout_keys)))
        else:
            total, _ = jax.lax.scan(add_slice, total, (slices, dropout_keys))
        return jax.tree.map(lambda a: a / (self.accumulate * scale), total)

    def compile(self, state: TrainState, batch: Batch) -> jax.stages.Compiled:
        """The step compiled for these arrays, or shapes with shardings; it takes the place of the state it is given."""
        options = {}
        if self.model.remat != "none" and jax.default_backend() == "cpu":
            # This pass removes what holds a recomputation back until the backward pass. It is then merged with the
            # forward pass, and remat saves nothing.
            options = {"xla_disable_hlo_passes": "cse_barrier_expander"}
        kept = jax.tree.map(lambda a: a.sharding, state)  # the next step is given what this one returns
        return jax.jit(self, donate_argnums=0, out_shardings=(kept, None)).lower(state, batch).compile(options)

    def loss(self, params: Any, batch: Batch, keys: Array, places: Array, dropout_key: Array) -> Array:
        """Mean loss of samples that draw from ``keys [B]`` and stand at ``places [B]`` of the batch; float32 scalar."""
        B = keys.shape[0]
        key_latents, key_time, key_noise, key_caption = jax.vmap(lambda key: jax.random.split(key, 4), out_axes=1)(keys)
        mean, std, hidden, pooled = (batch[key].astype(jnp.float32) for key in ("mean", "std", "hidden", "pooled"))
        noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(key_latents)
        x0 = self.to_model_latents(mean + std * noise)
        t = self.sample_times(key_time, places)
        x_t, targets = self.process.corrupt(key_noise, x0, t)

        text = TextStates(hidden, pooled, batch["mask"])
        null = self.model.apply({"params": params}, B, method="null_text")
        S = text.mask.shape[1]  # of this data; the null caption, of one token, is as long as the encoder allows
        null = TextStates(null.hidden[:, :S], null.pooled, null.mask[:, :S])
        drop = jax.vmap(lambda key: jax.random.bernoulli(key, self.caption_dropout))(key_caption)
        text = jax.tree.map(lambda n, y: jnp.where(drop.reshape(B, *[1] * (y.ndim - 1)), n, y), null, text)

        prediction = self.model.apply({"params": params}, x_t, t, text, train=True, rngs={"dropout": dropout_key})
        loss = objectives.loss(self.process, prediction, targets)
        if self.weight is not None:
            loss = loss * self.weight(t)
        if self.model.out_channels == 2 * self.model.in_channels:
            loss = loss + self.variance_weight * objectives.variance_loss(self.process, prediction, targets, t)
        return loss.mean()
