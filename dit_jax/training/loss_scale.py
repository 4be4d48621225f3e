"""Dynamic loss scaling, for training in float16 (Micikevicius et al. 2018, section 3.2).

Float16 has no numbers below 6e-8, so small gradients become zero on their way back through the network. A loss that is
multiplied by a scale s before the gradient is taken has gradients s times as large:

    g = grad(s . loss) / s                       in float32; s is a power of two, so that this rounds nothing       (1)

A g that is not finite is an overflow: s was too large, or the step is bad in itself. The step is skipped and s halved.
After `GROW_EVERY` finite steps in a row s is doubled. So s stays near the largest that the network allows. Only at the
floor of s is it no overflow any more: s cannot be the reason.

Own lines and not ``flax.training.dynamic_scale``: that takes the gradient itself and adjusts at every one, but the
slices of an accumulated batch must share one scale that is adjusted once a step. Start, growth and factors are the
usual ones; s finds its place from there within a few steps, so they are no config keys.
"""

import jax.numpy as jnp
from flax import struct

from dit_jax.arrays import Array

START = 2.0**16
FLOOR = 1.0
CEILING = 2.0**24  # in a run that never overflows s would grow beyond float32
GROW_EVERY = 2000  # steps


@struct.dataclass
class LossScale:
    """The scale of the next step, and how it came about. Compute in float32 and bfloat16 leaves it at rest.

    Attributes:
      scale: float32 scalar.
      finite_steps: int32 scalar, finite steps since the scale last changed.
    """

    scale: Array
    finite_steps: Array

    @classmethod
    def fresh(cls) -> "LossScale":
        """That of a new run."""
        return cls(jnp.float32(START), jnp.int32(0))

    def adjust(self, finite: Array) -> "LossScale":
        """After a step whose loss and gradient were finite, or were not: bool scalar."""
        grows = finite & (self.finite_steps + 1 >= GROW_EVERY)
        factor = jnp.where(grows, 2.0, jnp.where(finite, 1.0, 0.5))
        return LossScale(
            scale=jnp.clip(self.scale * factor, FLOOR, CEILING),
            finite_steps=jnp.where(finite & ~grows, self.finite_steps + 1, 0),
        )

    def overflows(self, finite: Array) -> Array:
        """Whether a smaller scale may mend what is not finite: bool scalar."""
        return ~finite & (self.scale > FLOOR)
