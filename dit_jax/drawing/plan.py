"""One compiled sampler: what it is made for, and the function of arrays that it becomes."""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dit_jax import build
from dit_jax.arrays import TextStates
from dit_jax.diffusion import editing, guidance, samplers

if TYPE_CHECKING:
    from dit_jax.diffusion.process import Process
    from dit_jax.encoders.latents import LatentScale
    from dit_jax.models.dit import DiT


class Plan(NamedTuple):
    """What one compiled sampler is made for. The guidance scale is its argument, but for 1: that is no guidance.

    ``first_step`` is where the grid is entered, ``masked`` whether a part of a picture is kept; ``settings`` are all
    other keys of ``sample`` in the config, as pairs.
    """

    height: int
    width: int
    guided: bool
    first_step: int
    masked: bool
    settings: tuple[tuple[str, Any], ...]

    @property
    def edited(self) -> bool:
        """Whether it reads a picture: strength 1 without a mask does not."""
        return self.masked or self.first_step > 0


def compile_sampler(
    plan: Plan, config: ConfigDict, model: "DiT", process: "Process", latents: "LatentScale", factor: int
) -> Any:
    """The jitted sampler of a plan; ``config`` is the run's with the plan's settings, ``factor`` that of the VAE.

    Returns:
      Parameters, keys ``[B]``, text states of B captions, those to guide away from (None: the null caption), guidance
      scale, and what is known of the picture that is edited (`dit_jax.drawing.canvas.Known` or None) -> raw latents
      ``[B, h, w, C]``.
    """
    h, w = plan.height // factor, plan.width // factor
    grid = build.make_grid(config, process)
    sampler = build.make_sampler(config, process, grid[plan.first_step :])
    correction = build.make_correction(config)

    def draw(params, keys, text, negative, scale, known):
        def apply(*args, method):
            return model.apply({"params": params}, *args, method=method)

        def predict(x_t, t, text):
            return apply(x_t, t, text, False, method="predict")

        if negative is None:
            negative = apply(len(keys), method="null_text")
        text, negative = (apply(states, method="prepare_text") for states in as_long(text, negative))
        segments = [(0, len(grid) - 1, guidance.conditional(predict, process, text))]
        if plan.guided:
            guided = guidance.classifier_free(predict, process, text, negative, scale, correction)
            segments = guidance.segments(grid, config.sample.guidance_interval, guided, segments[0][-1])
        x = samplers.draw_prior(keys, (h, w, model.in_channels))
        if known is not None:
            x0 = latents.to_model(known.mean)
            x = editing.start(process, x0, x, grid, plan.first_step)
            segments = editing.from_step(segments, plan.first_step)
        if plan.masked:
            segments = [
                (first, last, editing.keep_known(denoise, process, x0, known.keep)) for first, last, denoise in segments
            ]
        x = samplers.run(sampler, keys, x, grid, segments)
        if plan.masked:
            x = editing.paste(x, x0, known.keep)
        return latents.to_raw(x)

    return jax.jit(draw)


def as_long(*texts: TextStates) -> list[TextStates]:
    """Text states of the same length: padding, masked, follows the shorter ones."""
    S = max(text.mask.shape[1] for text in texts)
    padded = []
    for hidden, pooled, mask in texts:
        missing = S - mask.shape[1]
        hidden = jnp.pad(hidden, ((0, 0), (0, missing), (0, 0)))
        padded.append(TextStates(hidden, pooled, jnp.pad(mask, ((0, 0), (0, missing)))))
    return padded
