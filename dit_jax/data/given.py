"""Pictures and masks that a person hands over: the path of a file, a PIL image, or an array.

A picture is cropped and resized as one of the training set is. A mask says where it is to be drawn anew: white
(grey of 128 and more) is, black is kept. It has the size of the picture and is cut like it.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dit_jax.data.transforms import PictureError, crop, cut, decode, to_rgb

Given = str | Path | Image.Image | np.ndarray

WHITE = 128  # greys from here on count as white


def read_picture(given: Given) -> np.ndarray:
    """A picture as uint8 RGB ``[height, width, 3]``; an array has that shape, or ``[height, width]`` in grey.

    Raises:
      FileNotFoundError: there is no such file.
      PictureError: it cannot be read as a picture.
      ValueError: an array of another shape or dtype.
    """
    if isinstance(given, np.ndarray):
        if given.dtype != np.uint8 or given.shape[2:] not in ((), (3,)) or given.ndim < 2 or not given.size:
            raise ValueError(
                f"a picture is uint8 [height, width, 3] or [height, width], not {given.dtype} {list(given.shape)}"
            )
        return to_rgb(Image.fromarray(given))
    if isinstance(given, Image.Image):
        return to_rgb(ImageOps.exif_transpose(given))
    if not isinstance(given, str | Path):
        raise ValueError(f"a picture is a path, a PIL image or a numpy array, not {type(given).__name__}")
    path = Path(given)
    if not path.is_file():
        raise FileNotFoundError(f"no picture {path}")
    try:
        return decode(path.read_bytes())
    except PictureError as error:
        raise PictureError(f"{path}: {error}") from error


def read_mask(given: Given) -> np.ndarray:
    """A mask as bool ``[height, width]``, true where white; an array may be bool.

    Raises:
      FileNotFoundError, PictureError, ValueError: as of `read_picture`.
    """
    if isinstance(given, np.ndarray) and given.dtype == bool:
        given = np.where(given, np.uint8(255), np.uint8(0))
    grey = Image.fromarray(read_picture(given)).convert("L")
    return np.asarray(grey) >= WHITE


def fit_picture(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of a picture ``[tall, wide, 3]`` at a size, as in training: uint8 ``[height, width, 3]``."""
    return cut(image, height, width, 0.5, 0.5)


def fit_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of a mask ``[tall, wide]`` at a size, true where any of it is: bool ``[height, width]``."""
    rectangle = Image.fromarray(crop(mask, height, width, 0.5, 0.5).astype(np.float32))
    return np.asarray(rectangle.resize((width, height), Image.Resampling.BOX)) > 0
