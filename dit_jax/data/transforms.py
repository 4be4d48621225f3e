"""Pictures: from the bytes of a file to uint8 ``[height, width, 3]``.

Three steps, each a pure function: `decode` turns whatever people keep in a folder into plain RGB, `cut` takes
a rectangle and resizes it, `mirror` flips left and right. Nothing here draws random numbers: a random crop is a
`cut` whose place the caller has drawn.
"""

import contextlib
import io
import re
import warnings
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

# A written list, because Pillow knows formats that start other programs (EPS starts Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

# A picture one pixel high or wide is a tracking pixel or a placeholder.
SHORTEST_SIDE = 2

# Words that become false when the picture is mirrored; Chinese has no spaces to mark where a word ends.
SIDES = re.compile(
    r"\b(left|right|leftmost|rightmost|left-?hand(ed)?|right-?hand(ed)?|leftwards?|rightwards?"
    r"|(anti|counter)?-?clockwise|east|west|eastwards?|westwards?)\b|左|右",
    re.IGNORECASE,
)


LARGEST_PICTURE = 2**29  # bytes of a file: as many as the largest that is decoded takes uncompressed, in 16 bits
TOO_LARGE = f"a file of more than {LARGEST_PICTURE:,} bytes"


# Pillow warns of what is an error here, and would do so on the terminal of a run, in every process that reads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class PictureError(ValueError):
    """The bytes are not a usable picture; the message is the reason, in one line."""


def decode(content: bytes) -> np.ndarray:
    """Decodes a picture file as uint8 RGB, ``[height, width, 3]``.

    Transparency is laid on white; palettes, CMYK, grey and 16-bit pictures are converted; of an animation the
    first frame is taken; the EXIF orientation is applied.

    Raises:
      PictureError: empty, truncated or unknown content, a side shorter than two pixels, or more pixels than
        ``PIL.Image.MAX_IMAGE_PIXELS`` (a decompression bomb).
    """
    with _opened(content) as image:
        return to_rgb(ImageOps.exif_transpose(image))


def picture_size(content: bytes) -> tuple[int, int]:
    """Height and width of what `decode` returns, from the head of a file; it may be all that is given.

    A PNG that says behind its pixels how it is turned is taken as it lies.

    Raises:
      PictureError: as of `decode`, but for pixels that are damaged: they are not looked at.
    """
    with _opened(content) as image:
        width, height = image.size
        says_it_here = image.format != "PNG" or "exif" in image.info  # else Pillow would read all of a PNG
        turned = says_it_here and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return (width, height) if turned else (height, width)


@contextlib.contextmanager
def _opened(content: bytes) -> Iterator[Image.Image]:
    """A picture whose pixels are not decoded yet; whatever is wrong with it, or found wrong with it, is told."""
    if not content:
        raise PictureError("empty file (0 bytes)")
    if len(content) > LARGEST_PICTURE:
        raise PictureError(TOO_LARGE)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check_size(*image.size)
            yield image
    except PictureError:
        raise
    except UnidentifiedImageError as error:  # its message holds a memory address: new on every run
        raise PictureError(f"not a picture that can be read ({', '.join(FORMATS)})") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many_pixels() from error
    except MemoryError:  # this machine's fault, not the picture's: another run would decode it
        raise
    except Exception as error:  # decoders let out whatever they trip over in a damaged file
        raise PictureError(f"cannot be decoded: {error}") from error


def _check_size(width: int, height: int) -> None:
    if min(width, height) < SHORTEST_SIDE:
        raise PictureError(f"too small: {width}x{height} pixels")
    # Pillow refuses twice this number and only warns from here on.
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise _too_many_pixels()


def _too_many_pixels() -> PictureError:
    """The same whoever counts them, Pillow or we, so that reasons are alike on every run."""
    return PictureError(f"too many pixels: more than the limit of {Image.MAX_IMAGE_PIXELS:,} (a decompression bomb?)")


def to_rgb(image: Image.Image) -> np.ndarray:
    """Converts any mode of Pillow's to uint8 RGB ``[height, width, 3]``, transparency laid on white.

    Raises:
      PictureError: floating-point pixels, whose range is not known.
    """
    if image.mode.startswith("I"):  # 16-bit grey; 16-bit RGB reaches us as 8-bit, by the same shift
        grey = (np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise PictureError("floating-point pixels, whose range is not known; save it with 8 or 16 bits")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def cut(image: np.ndarray, height: int, width: int, across: float, down: float) -> np.ndarray:
    """Takes the largest rectangle of a shape out of a picture and resizes it.

    The same as the usual "resize until it just covers, then crop", in the other order: there are fewer pixels to
    resample, and a picture that has the right size already comes back unchanged.

    Args:
      image: uint8 ``[tall, wide, 3]``.
      height, width: of the result, in pixels.
      across: where the rectangle lies in a picture that is too wide, in [0, 1): 0 is the left edge, 0.5 the centre.
      down: where it lies in one that is too tall: 0 is the top edge, 0.5 the centre.

    Returns:
      uint8 ``[height, width, 3]``.
    """
    rectangle = crop(image, height, width, across, down)
    if rectangle.shape[:2] == (height, width):
        return rectangle
    # Lanczos is antialiased; a gap of 3 lets Pillow average whole pixels first where a photo shrinks a lot.
    resized = Image.fromarray(rectangle).resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return np.array(resized)


def crop(image: np.ndarray, height: int, width: int, across: float, down: float) -> np.ndarray:
    """The rectangle that `cut` takes, before it is resized: ``[tall, wide, ...]`` of any dtype -> a smaller one."""
    tall, wide = image.shape[:2]
    if tall * width <= wide * height:  # too wide, or just right
        rows, columns = tall, _rounded(tall * width, height)
    else:
        rows, columns = _rounded(wide * height, width), wide
    left = int(across * (wide - columns + 1))
    top = int(down * (tall - rows + 1))
    return np.ascontiguousarray(image[top : top + rows, left : left + columns])


def _rounded(numerator: int, denominator: int) -> int:
    """The whole number nearest to a fraction, at least 1."""
    return max(1, (2 * numerator + denominator) // (2 * denominator))


def mirror(image: np.ndarray) -> np.ndarray:
    """Flips ``[..., width, 3]`` left and right."""
    return np.ascontiguousarray(image[..., ::-1, :])


def captions_speak_of_sides(captions: Iterable[str]) -> bool:
    """Whether any caption names a side, so that mirrored pictures would contradict their captions.

    The rule for flips that are chosen automatically. One mention is enough: flips that are left out cost
    little, a wrong caption teaches that left is right.
    """
    return any(SIDES.search(caption) for caption in captions)
