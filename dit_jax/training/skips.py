"""Steps that are skipped, because their loss or gradient is not finite, and how many of them are too many.

A skipped step changes neither parameters, average nor optimizer; the global step goes on, and with it data, randomness
and learning rate. Now and then one is skipped: a picture, or a draw, that nobody expected. A row of them that does not
end is a run that has diverged. In float16 an overflow is no sign of that, it lowers the loss scale
(`dit_jax.training.loss_scale`): such a step is skipped and counted too, but neither lengthens a row nor ends it.

Own lines and not ``optax.apply_if_finite``: after its number of bad steps in a row that applies the next one.
"""

import jax.numpy as jnp
from flax import struct

from dit_jax.arrays import Array


@struct.dataclass
class Skips:
    """How many steps of a run were skipped.

    Attributes:
      total: int32 scalar, since the run began.
      in_a_row: int32 scalar, until now without a finite step between them; overflows do not count.
    """

    total: Array
    in_a_row: Array

    @classmethod
    def none(cls) -> "Skips":
        """That of a new run."""
        return cls(jnp.int32(0), jnp.int32(0))

    def count(self, finite: Array, overflow: Array) -> "Skips":
        """After a step: whether it was finite, and whether that it was not is an overflow; bool scalars."""
        longer = self.in_a_row + jnp.where(overflow, 0, 1)
        return Skips(self.total + jnp.where(finite, 0, 1), jnp.where(finite, 0, longer))
