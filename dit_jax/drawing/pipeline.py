"""A trained model with its encoders: prompts in, pictures out.

Text, noise, sampler and VAE run on the device; the whole sampler is one compiled loop. Image i of a call has the
seed ``seed + i`` and depends on nothing else: that seed alone draws it again, whatever the batch.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from dit_jax import __version__
from dit_jax.arrays import TextStates, to_pixels
from dit_jax.config import CHANGEABLE
from dit_jax.errors import ConfigError
from dit_jax.files import flatten
from dit_jax.resolve import check_ranges

if TYPE_CHECKING:
    from dit_jax.data.given import Given
    from dit_jax.drawing.canvas import Canvas, Known
    from dit_jax.drawing.plan import Plan
    from dit_jax.encoders import VAE, TextEncoder
    from dit_jax.encoders.tokenizer import LongPrompt
    from dit_jax.stored import Trained

BATCHES = (1, 4, 16, 64)  # compiled batch sizes: a call is cut into the largest and padded to the smallest that fits


class Pipeline:
    """A trained model with its encoders: prompts in, pictures out.

    Args:
      config: the run's resolved config.
      vae, text_encoder: its frozen encoders.
      params: parameters of the DiT; may be replaced between calls (as training does).
      trained: what they came from; its step is written into the PNG files.

    Attributes: the arguments, by the same names.
    """

    def __init__(
        self, config: ConfigDict, vae: "VAE", text_encoder: "TextEncoder", params: Any, trained: "Trained"
    ) -> None:
        import jax

        from dit_jax import build

        self.config, self.vae, self.text_encoder = config, vae, text_encoder
        self.params, self.trained = params, trained
        self._model = build.make_model(config, build.compute_dtype(config.dtype, jax.devices()[0]))
        self._process = build.make_process(config)
        self._latents = build.make_latents(config)
        self._compiled = functools.lru_cache(maxsize=None)(self._compile)

    @classmethod
    def load(cls, path: str | Path, ema: str | None = None, step: int | None = None) -> "Pipeline":
        """Load a trained model.

        Args:
          path: the folder of a run or an export, or the hub id of an export.
          ema: ``ema`` for the averaged parameters, ``raw`` for the last ones; None takes what an export holds, and the
            averaged ones of a run.
          step: which checkpoint of a run; None takes the newest.

        Raises:
          CheckpointError: no such model there, or one that was trained with other encoders.
          ConfigError: ``ema`` is neither, or an encoder cannot be loaded.
          FetchError: the hub or a bucket does not answer.
        """
        from dit_jax import build
        from dit_jax.stored import open_stored

        stored = open_stored(path, ema, step)
        encoders = stored.encoder_config()
        vae, text_encoder = build.make_vae(encoders), build.make_text_encoder(encoders)
        stored.check_encoders({"vae": vae.sha256, "text_encoder": text_encoder.sha256})
        return cls(stored.config, vae, text_encoder, stored.restore(vae.factor), stored.trained)

    def __call__(
        self,
        prompts: Sequence[str],
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | Sequence[int] = 0,
        num_images: int = 1,
        negative_prompt: str | None = None,
        sampler: str | None = None,
        height: int | None = None,
        width: int | None = None,
        long_prompt: "LongPrompt" = "truncate",
        init_image: "Given | None" = None,
        mask: "Given | None" = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Draw ``num_images`` pictures per prompt, prompt by prompt.

        Args:
          prompts: captions.
          steps, guidance_scale, sampler, height, width: None takes the run's own (pixels for the last two).
          seed: of the first picture, and picture i has ``seed + i``; or as many as there are pictures.
          negative_prompt: what guidance leads away from; None is the learned null caption.
          long_prompt: captions longer than the text encoder takes are cut with a warning (``truncate``), refused
            (``error``) or read in pieces (``chunk``).
          init_image: what to start from: a path, a PIL image or an array, uint8 ``[height, width, 3]``. It is cropped
            and resized like a picture of the training set. How much of it goes is ``strength``, one of the settings.
          mask: of the size of ``init_image``. White is drawn anew, at strength 1 unless told otherwise; black is kept.
          settings: any other key of ``sample`` in the config, such as ``grid`` or ``guidance_interval``.

        Returns:
          PIL images, ``len(prompts) * num_images`` of them; prompt, seed and step are in their ``info``.

        Raises:
          ConfigError: a value that cannot be.
          DataError: ``init_image`` or ``mask`` cannot be read.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        prompts = [prompt for prompt in prompts for _ in range(num_images)]
        seeds = spread_seeds(seed, len(prompts))
        pixels = self.draw(
            prompts,
            seeds,
            negative_prompt,
            height,
            width,
            long_prompt,
            init_image,
            mask,
            steps=steps,
            guidance_scale=guidance_scale,
            sampler=sampler,
            **settings,
        )
        images = [Image.fromarray(p) for p in pixels]
        for image, prompt, one_seed in zip(images, prompts, seeds, strict=True):
            image.info = {"prompt": prompt, "seed": str(one_seed), "step": str(self.trained.step)}
        return images

    def draw(
        self,
        prompts: Sequence[str] | TextStates,
        seeds: Sequence[int],
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        long_prompt: "LongPrompt" = "truncate",
        init_image: "Given | None" = None,
        mask: "Given | None" = None,
        **settings: Any,
    ) -> np.ndarray:
        """Like a call, with one seed per prompt: uint8 ``[len(prompts), height, width, 3]``.

        ``prompts`` may also be text states, ``text_encoder(captions)`` or a mixture of such, for which ``long_prompt``
        is of no account. ``settings`` are keys of ``sample`` in the config; None takes the run's own.
        """
        from dit_jax.build import config_errors
        from dit_jax.drawing.canvas import read_canvas

        canvas = read_canvas(init_image, mask)
        plan, scale = self._plan(height, width, canvas, settings)
        count = len(prompts.mask) if isinstance(prompts, TextStates) else len(prompts)
        if not count:
            raise ConfigError("there is nothing to draw: no prompts")
        if len(seeds) != count:
            raise ConfigError(f"{len(seeds)} seeds for {count} pictures; draw takes one for each")
        check_seeds(seeds)
        if negative_prompt is not None and not plan.guided:
            warnings.warn("negative_prompt does nothing at guidance_scale 1", stacklevel=2)
        with config_errors("prompt"):
            text_of = self._text_of(prompts, long_prompt)
            negative = None if negative_prompt is None else self.text_encoder([negative_prompt], long_prompt)
        known = canvas.latents(self.vae, plan.height, plan.width) if canvas and plan.edited else None

        pictures = []
        for first in range(0, count, BATCHES[-1]):
            n = min(BATCHES[-1], count - first)
            B = next(size for size in BATCHES if size >= n)
            rows = np.minimum(np.arange(first, first + B), count - 1)  # the last one fills the batch
            pictures.append(self._draw_batch(plan, text_of(rows), np.asarray(seeds)[rows], negative, scale, known)[:n])
        return np.concatenate(pictures)

    def _text_of(
        self, prompts: Sequence[str] | TextStates, long_prompt: "LongPrompt"
    ) -> Callable[[np.ndarray], TextStates]:
        """From numbers of prompts to their text states; captions are cut into tokens now, and encoded then."""
        if isinstance(prompts, TextStates):
            return lambda rows: TextStates(*(np.asarray(states)[rows] for states in prompts))
        ids, real = self.text_encoder.tokenize(list(prompts), long_prompt)
        return lambda rows: self.text_encoder.encode_ids(ids[rows], real[rows])

    def identity(
        self,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        long_prompt: "LongPrompt" = "truncate",
        init_image: "Given | None" = None,
        mask: "Given | None" = None,
        **settings: Any,
    ) -> dict[str, Any]:
        """All that decides a picture of `draw` beside prompt and seed, the model included, as JSON has it.

        Raises as `draw` does where one of the arguments cannot be.
        """
        from dit_jax.drawing.canvas import read_canvas

        canvas = read_canvas(init_image, mask)
        plan, scale = self._plan(height, width, canvas, settings)
        return {
            "model": {
                "config": {key: value for key, value in flatten(self.config).items() if key not in CHANGEABLE},
                "dtype": np.dtype(self._model.dtype).name,
                "version": __version__,
                **asdict(self.trained),
            },
            "sample": {**dict(plan.settings), "guidance_scale": scale, "first_step": plan.first_step},
            "height": plan.height,
            "width": plan.width,
            "negative_prompt": negative_prompt,
            "long_prompt": long_prompt,
            "canvas": canvas.sha256() if canvas and plan.edited else None,
        }

    def sample_config(self, settings: dict[str, Any]) -> ConfigDict:
        """The run's config with other keys of ``sample``, where they are not None.

        Raises:
          ConfigError: there is no such key, or its value cannot be.
        """
        from dit_jax.build import config_errors

        config = self.config.copy_and_resolve_references()
        if unknown := set(settings) - set(config.sample):
            raise ConfigError(f"unknown {', '.join(sorted(unknown))}; settings are {', '.join(sorted(config.sample))}")
        with config_errors("sample"):
            config.sample.update({key: value for key, value in settings.items() if value is not None})
        check_ranges(config)
        return config

    def _plan(
        self, height: int | None, width: int | None, canvas: "Canvas | None", settings: dict[str, Any]
    ) -> tuple["Plan", float]:
        """What to compile, and the guidance scale."""
        from dit_jax import build
        from dit_jax.diffusion.editing import first_step
        from dit_jax.drawing.plan import Plan

        chosen = self.sample_config(settings).sample.to_dict()
        scale = float(chosen.pop("guidance_scale"))
        strength = chosen.pop("strength")
        del chosen["prompts"]
        if canvas is None:
            if settings.get("strength") is not None:
                raise ConfigError(f"strength {strength} is of a picture to start from; there is no init_image")
            strength = 1.0
        elif canvas.redraw is not None and settings.get("strength") is None:
            strength = 1.0
        plan = Plan(
            height=self.config.data.image_size if height is None else height,
            width=self.config.data.image_size if width is None else width,
            guided=scale != 1.0,
            first_step=first_step(chosen["steps"], strength),
            masked=canvas is not None and canvas.redraw is not None,
            settings=tuple(chosen.items()),
        )
        self._check_size(plan)
        config = self.sample_config(dict(plan.settings))
        build.make_sampler(config, self._process, build.make_grid(config, self._process)[plan.first_step :])
        return plan, scale

    def _check_size(self, plan: "Plan") -> None:
        unit = self.vae.factor * self.config.model.patch_size
        if any(side < unit or side % unit for side in (plan.height, plan.width)):
            size = f"{plan.height} x {plan.width}"
            raise ConfigError(f"a picture of {size}: height and width must be multiples of {unit}")

    def _draw_batch(
        self,
        plan: "Plan",
        text: TextStates,
        seeds: np.ndarray,
        negative: TextStates | None,
        scale: float,
        known: "Known | None",
    ) -> np.ndarray:
        """One batch: text states and seeds ``[B]``, negative text of one -> uint8 ``[B, height, width, 3]``."""
        import jax
        import jax.numpy as jnp

        from dit_jax.build import decoding_dtype

        if negative is not None:
            negative = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(seeds), *a.shape[1:])), negative)
        keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
        latents = self._compiled(plan)(self.params, keys, text, negative, scale, known)
        return to_pixels(self.vae.decode(latents, decoding_dtype(self._model.dtype)))

    def _compile(self, plan: "Plan") -> Any:
        from dit_jax.drawing.plan import compile_sampler

        config = self.sample_config(dict(plan.settings))
        return compile_sampler(plan, config, self._model, self._process, self._latents, self.vae.factor)


def spread_seeds(seed: int | Sequence[int], count: int) -> Sequence[int]:
    """The seeds of ``count`` pictures: ``seed + i``, or those that were given one by one.

    Raises:
      ConfigError: neither one seed nor as many as pictures.
    """
    given = [seed] if isinstance(seed, int | np.integer) else list(seed)
    if len(given) == 1:
        return range(int(given[0]), int(given[0]) + count)
    if len(given) != count:
        raise ConfigError(f"{len(given)} seeds for {count} pictures; give one, or as many as pictures")
    return given


def check_seeds(seeds: Sequence[int]) -> None:
    """ConfigError unless all seeds can be."""
    if min(seeds) < 0 or max(seeds) >= 2**32:
        raise ConfigError(f"seeds from {min(seeds)} to {max(seeds)}; they must be in [0, 2**32)")
