"""What is edited: a picture, and perhaps a mask, from the user's hand to latents."""

import hashlib
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dit_jax.arrays import to_signed
from dit_jax.data.given import Given, fit_mask, fit_picture, read_mask, read_picture
from dit_jax.data.transforms import PictureError
from dit_jax.diffusion.editing import kept_latents
from dit_jax.errors import ConfigError, DataError

if TYPE_CHECKING:
    from dit_jax.encoders import VAE


class Known(NamedTuple):
    """What a sampler must know of the picture; a pytree.

    Attributes:
      mean: raw latents of the picture, ``[1, h, w, C]``: the mean that the VAE gives.
      keep: bool ``[1, h, w, 1]``, where they are kept; None without a mask.
    """

    mean: Any
    keep: np.ndarray | None


class Canvas(NamedTuple):
    """A picture as it was given, uint8 ``[tall, wide, 3]``; ``redraw`` bool ``[tall, wide]``, or None."""

    picture: np.ndarray
    redraw: np.ndarray | None

    def latents(self, vae: "VAE", height: int, width: int) -> Known:
        """The picture at a size as latents, and which of them are kept."""
        pixels = to_signed(fit_picture(self.picture, height, width)[None])
        mean, _ = vae.encode(pixels)
        if self.redraw is None:
            return Known(mean, None)
        keep = kept_latents(fit_mask(self.redraw, height, width), vae.factor)
        if keep.all():
            warnings.warn("the mask is black all over: nothing is drawn anew", stacklevel=2)
        return Known(mean, keep[None, :, :, None])

    def sha256(self) -> str:
        """Of picture and mask, as they were given."""
        content = hashlib.sha256(repr(self.picture.shape).encode() + self.picture.tobytes())
        if self.redraw is not None:
            content.update(self.redraw.tobytes())
        return content.hexdigest()


def read_canvas(init_image: Given | None, mask: Given | None) -> Canvas | None:
    """Read what is to be edited; None where nothing is.

    Raises:
      ConfigError: a mask without a picture or of another size, no such file, or an array that is no picture.
      DataError: a file that cannot be read as a picture.
    """
    if init_image is None:
        if mask is not None:
            raise ConfigError("a mask without a picture: give init_image, which it is a mask of")
        return None
    name = "init_image"
    try:
        picture = read_picture(init_image)
        if mask is None:
            return Canvas(picture, None)
        name = "mask"
        redraw = read_mask(mask)
    except (PictureError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise ConfigError(f"{name}: {error}") from error
        raise DataError(f"{name}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error
    if redraw.shape != picture.shape[:2]:
        (tall, wide), (height, width) = redraw.shape, picture.shape[:2]
        raise ConfigError(
            f"the mask is {wide} x {tall} pixels and init_image {width} x {height}; they must have the same size"
        )
    return Canvas(picture, redraw)
