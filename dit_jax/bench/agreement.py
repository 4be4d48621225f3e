"""Whether two implementations compute the same, which has to be seen before their speeds are compared."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax import build
from dit_jax.arrays import TextStates
from dit_jax.bench import reference
from dit_jax.bench.presets import LATENT_SCALE, Bench

# Most of the relative errors, by compute dtype: float32 differs in the order of sums alone.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
# The same of latents at the end of a run, where every step added to what the one before was off by.
LATENT_TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-1}


class Agreement(NamedTuple):
    """Relative errors: of the outputs, by their largest number, and of the norm of the gradient."""

    outputs: float
    gradient_norm: float


def agree(bench: Bench, params: Any) -> Agreement:
    """How far the torch module is from ours at the same parameters and inputs, without dropout.

    Raises:
      AssertionError: further than rounding explains.
    """
    model, B = bench.model, len(bench.batch["mean"])
    random = np.random.default_rng(1)
    shape = bench.batch["mean"].shape
    x_t, target = (random.standard_normal((*shape[:3], n), np.float32) for n in (shape[3], model.out_channels))
    t = random.uniform(size=B).astype(np.float32)
    text = TextStates(*(bench.batch[key] for key in TextStates._fields))
    text = text._replace(hidden=text.hidden.astype(np.float32), pooled=text.pooled.astype(np.float32))

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        out = model.apply({"params": params}, x_t, t, text, train=False)
        return jnp.square(out - target).mean(), out

    (_, ours), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    norm = float(jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(grads))))
    theirs, their_norm = reference.output_and_gradient_norm(bench, params, (x_t, t, text), target)
    error = float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())
    found = Agreement(error, abs(norm - their_norm) / their_norm)
    most = TOLERANCE[bench.config.dtype]
    assert max(found) <= most, f"torch computes something else: relative errors {found}, at most {most} expected"
    return found


def agree_on_latents(bench: Bench, start: jax.Array, ours: np.ndarray, theirs: np.ndarray) -> float:
    """How far the latents ``[B, h, w, C]`` that torch drew are from ours, relative to what the network did, by norms.

    What it did is what they differ in from those of a network that sees no noise anywhere: those are the start,
    divided by alpha there, which is large, and would hide a difference.

    Raises:
      AssertionError: further than rounding explains.
    """
    alpha = bench.step.process.schedule.alpha(build.make_grid(bench.config, bench.step.process)[0])
    unseen = np.asarray(start) / (float(alpha) * LATENT_SCALE)
    error = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs - unseen))
    most = LATENT_TOLERANCE[jnp.dtype(bench.model.dtype).name]
    assert error <= most, f"torch draws something else: relative error {error:.1e} of latents, at most {most} expected"
    return error
