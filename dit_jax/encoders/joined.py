"""Several text towers read as one: SDXL's two, whose states stand side by side.

    hidden = [hidden_1, hidden_2, ...]  along the width           pooled = that of the last tower

The paper is Podell et al., "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis"
(arXiv:2307.01952), section 2.1.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from dit_jax.arrays import TextStates
from dit_jax.encoders.clip import CLIPTextModel


class JoinedTextModel(nn.Module):
    """Text towers with one vocabulary and one length; used like a single `CLIPTextModel`.

    The towers may have been trained with different padding tokens: padding changes no result, so that the
    same ids serve all of them. They are the first tokenizer's: OpenCLIP's, as published, pads with "!" and so takes
    every "!" of a caption for padding too, which its network was not trained with.

    Attributes:
      towers: from the first to the last, whose ``pooled`` is that of all.
    """

    towers: Sequence[CLIPTextModel]

    @property
    def vocab_size(self) -> int:
        """The ids that every tower knows."""
        return min(tower.vocab_size for tower in self.towers)

    @property
    def length(self) -> int:
        """S."""
        return self.towers[0].length

    @property
    def width(self) -> int:
        """E, the sum of the towers' widths."""
        return sum(tower.width for tower in self.towers)

    @property
    def pooled_width(self) -> int:
        """P."""
        return self.towers[-1].pooled_width

    def __call__(self, ids: jax.Array, mask: jax.Array) -> TextStates:
        """Token ids to text states; arguments and results as of `CLIPTextModel`."""
        states = [tower(ids, mask) for tower in self.towers]
        return TextStates(jnp.concatenate([s.hidden for s in states], axis=-1), states[-1].pooled, mask)
