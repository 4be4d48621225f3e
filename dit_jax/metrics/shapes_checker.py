"""Reads a picture of the shapes world back, without any network, and says which parts of its caption hold.

A generated picture is never pixel-exact: a VAE softens edges, a sampler leaves some noise. So the checker
works with soft coverage instead of exact colours:

1. background = median of the neutral pixels; what differs from it visibly, in connected pieces, is an object;
2. colour = the nearest colour of the palette to the median of an object's core;
3. shape, size and place = the best of many templates, drawn by the renderer of the shapes world itself over
   shapes, radii and sub-pixel positions. With coverages a and b, both in [0, 1] per pixel, the agreement is

       overlap(a, b) = 2 sum(a b) / (sum(a^2) + sum(b^2))        (soft Dice, 1 where a = b)          (1)

   For binary masks (1) is Dice's coefficient (Dice 1945, Ecology 26). A picture whose best agreement is
   poor has no shape: a ring is no circle, and a blob is not "the nearest star".

Lenient to the medium, strict about content: a piece too many, of whatever colour, makes a picture wrong.
"""

from collections.abc import Sequence
from functools import cache
from itertools import permutations
from typing import Literal, NamedTuple

import numpy as np
from scipy import ndimage

from dit_jax.data.shapes_world import (
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIZE,
    OUTLINES,
    RADII,
    RELATIONS,
    Object,
    Scene,
    render,
)

# Distances are Euclidean in RGB levels (0 to 255).
MAX_CHROMA = 45  # max - min of the channels of a pixel that may be background
MIN_BACKGROUND = 0.25  # share of the picture; three of the largest objects leave more
MIN_CONTRAST = 40  # of an object's pixels to the background; the weakest pair, pink on grey, has 92
MIN_AREA = 8  # pixels; smaller pieces are specks. The smallest object has 75
MAX_COLOUR_ERROR = 50  # half the distance of the two nearest colours, red and orange
MAX_OFF_COLOUR = 0.2  # share of an object's area that may be far from the line background-colour
MIN_OVERLAP = 0.94  # of an object with its best template, equation (1); true shapes reach 0.97, rings do not
MAX_RADIUS_ERROR = 2.0  # px to the radius of a named size; between the two lie sizes without a name
SOFT_EDGE = 2  # px around an object in which its soft edge is looked for; half of the smallest gap

WINDOW = 40  # px; side of a template
TEMPLATE_BLUR = 0.7  # px; between a sharp render and a decoded latent, so that both overlap well
SUBPIXELS = 4  # positions of a template per pixel
TEMPLATE_RADII = np.arange(5.0, 16.5, 0.5)  # px


class Found(NamedTuple):
    """An object read from a picture; a part that cannot be named is None."""

    size: str | None
    colour: str | None
    shape: str | None
    x: float
    y: float


class Verdict(NamedTuple):
    """Which parts of a caption hold in a picture.

    Attributes:
      object: as many objects as the caption names.
      colour: every object of the caption is there in its colour, and so on for `shape` and `size`.
      relation: the first object stands to the second as the caption says (true where it says nothing).
    """

    object: bool
    colour: bool
    shape: bool
    size: bool
    relation: bool

    @property
    def right(self) -> bool:
        """Every part holds."""
        return all(self)


def check(image: np.ndarray, scene: Scene) -> Verdict:
    """Compare a picture with the scene that its caption describes.

    Positions, exact radii and background of the scene do not matter: the caption does not name them.

    Args:
      image: uint8 `[64, 64, 3]`.
      scene: a scene with the caption that the picture was made for.

    Raises:
      ValueError: `image` has another shape or type.
    """
    found = find_objects(image)
    count = len(scene.objects)
    # The six largest will do: a picture with more is wrong already.
    readings: list[Found | None] = [*found[:6]] + [None] * (count - len(found))
    # Objects in a picture carry no names: of all ways to tell which is which, take the kindest.
    chosen = max(permutations(readings, count), key=lambda reading: _agreement(reading, scene))
    return Verdict(
        object=len(found) == count,
        colour=all(_holds(chosen, scene, "colour")),
        shape=all(_holds(chosen, scene, "shape")),
        size=all(_holds(chosen, scene, "size")),
        relation=_relation_holds(chosen, scene.relation),
    )


def find_objects(image: np.ndarray) -> list[Found]:
    """Read the objects of a picture, the largest first; no objects where there is no neutral background.

    Args:
      image: uint8 `[64, 64, 3]`.

    Raises:
      ValueError: `image` has another shape or type.
    """
    if image.shape != (IMAGE_SIZE, IMAGE_SIZE, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"the picture is {image.dtype} {image.shape}; the checker reads uint8 {(IMAGE_SIZE, IMAGE_SIZE, 3)}"
        )
    pixels = image.astype(np.float32)
    neutral = np.ptp(pixels, axis=-1) <= MAX_CHROMA
    if neutral.mean() < MIN_BACKGROUND:
        return []
    background = np.median(pixels[neutral], axis=0)
    contrast = np.linalg.norm(pixels - background, axis=-1)
    pieces, _ = ndimage.label(contrast > MIN_CONTRAST)
    areas = np.bincount(pieces.ravel())
    labels = [k for k in np.argsort(-areas) if k > 0 and areas[k] >= MIN_AREA]
    return [_read(pixels - background, contrast, pieces, k, background) for k in labels]


def _read(
    difference: np.ndarray, contrast: np.ndarray, pieces: np.ndarray, label: int, background: np.ndarray
) -> Found:
    """Name the colour, shape, size and place of one piece of a picture."""
    piece = pieces == label
    core = piece & (contrast > 0.8 * np.percentile(contrast[piece], 90))
    direction = np.median(difference[core], axis=0)

    near = ndimage.binary_dilation(piece, iterations=SOFT_EDGE) & ((pieces == label) | (pieces == 0))
    coverage = np.where(near, _coverage(difference, direction), 0)
    off_line = np.linalg.norm(difference - coverage[..., None] * direction, axis=-1)
    uniform = (off_line[piece] > MAX_COLOUR_ERROR).mean() <= MAX_OFF_COLOUR
    shape, radius, x, y, overlap = _match(coverage)
    return Found(
        size=_nearest(RADII, radius, MAX_RADIUS_ERROR),
        colour=_nearest(COLOURS, direction + background, MAX_COLOUR_ERROR) if uniform else None,
        shape=shape if overlap >= MIN_OVERLAP else None,
        x=x,
        y=y,
    )


def _coverage(difference: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """How much of each pixel an object covers, where background + `direction` is its colour: in [0, 1]."""
    return np.clip(difference @ direction / (direction @ direction), 0, 1)


def _nearest(names: dict, value: float | np.ndarray, max_error: float) -> str | None:
    """The name whose value is nearest, unless even that is further than `max_error`."""
    errors = {name: np.linalg.norm(np.subtract(value, named)) for name, named in names.items()}
    best = min(errors, key=lambda name: errors[name])
    return best if errors[best] <= max_error else None


def _match(coverage: np.ndarray) -> tuple[str, float, float, float, float]:
    """The best template for a coverage: shape, radius, centre x and y in pixels, overlap (1)."""
    centroid = _centroid(coverage)
    corner = np.round((centroid - WINDOW / 2) * SUBPIXELS).astype(int)  # in subpixels
    whole, part = corner // SUBPIXELS, corner % SUBPIXELS
    padded = np.pad(coverage, WINDOW)
    x, y = whole + WINDOW
    window = padded[y : y + WINDOW, x : x + WINDOW]

    bank = _template_bank(*part)
    overlap = 2 * bank.coverages @ window.ravel() / ((coverage**2).sum() + bank.energies)  # equation (1)
    best = int(overlap.argmax())
    shape, radius = bank.names[best]
    x, y = centroid - _unit_centroid(shape) * radius
    return shape, radius, float(x), float(y), float(overlap[best])


class _Bank(NamedTuple):
    """Templates of all shapes and radii at one sub-pixel position."""

    names: list[tuple[str, float]]  # shape, radius
    coverages: np.ndarray  # [n, WINDOW * WINDOW]
    energies: np.ndarray  # [n] sum of squares


@cache
def _template_bank(x_part: int, y_part: int) -> _Bank:
    """Templates whose centroid lies (x_part, y_part) / SUBPIXELS beyond the middle of the window."""
    first = (IMAGE_SIZE - WINDOW) // 2
    names = [(shape, float(radius)) for shape in OUTLINES for radius in TEMPLATE_RADII]
    rows = []
    for shape, radius in names:
        x, y = IMAGE_SIZE / 2 + np.array([x_part, y_part]) / SUBPIXELS - _unit_centroid(shape) * radius
        drawn = _draw_alone(shape, radius, x, y)
        rows.append(drawn[first : first + WINDOW, first : first + WINDOW].ravel())
    coverages = np.stack(rows)
    return _Bank(names, coverages, (coverages**2).sum(axis=1))


@cache
def _unit_centroid(shape: str) -> np.ndarray:
    """Centroid of a shape of radius 1, relative to the centre of its bounding box."""
    radius = 16.0
    return (_centroid(_draw_alone(shape, radius, IMAGE_SIZE / 2, IMAGE_SIZE / 2)) - IMAGE_SIZE / 2) / radius


def _draw_alone(shape: str, radius: float, x: float, y: float) -> np.ndarray:
    """Soft coverage `[64, 64]` of one object, drawn by the shapes world."""
    item = Object("large", "red", shape, float(x), float(y), radius)
    background = np.array(BACKGROUNDS["white"], np.float32)
    image = render(Scene((item,), None, "white", ""))
    sharp = _coverage(image - background, COLOURS["red"] - background)
    return ndimage.gaussian_filter(sharp, TEMPLATE_BLUR)


def _centroid(coverage: np.ndarray) -> np.ndarray:
    """Centre of mass (x, y) in pixels."""
    middles = np.arange(IMAGE_SIZE) + 0.5
    return np.array([coverage.sum(axis=0) @ middles, coverage.sum(axis=1) @ middles]) / coverage.sum()


_Reading = Sequence[Found | None]  # which object of a picture stands for each object of a scene


def _holds(reading: _Reading, scene: Scene, part: Literal["colour", "shape", "size"]) -> list[bool]:
    """For each object of the scene whether a part of its caption holds."""
    return [
        found is not None and getattr(found, part) == getattr(item, part)
        for found, item in zip(reading, scene.objects, strict=True)
    ]


def _relation_holds(reading: _Reading, relation: str | None) -> bool:
    """Whether the first object lies to the named side of the second, and more so than to any other side."""
    if relation is None:
        return True
    first, second = reading[:2]
    if first is None or second is None:
        return False
    side = np.array(RELATIONS[relation])
    shift = np.array([first.x - second.x, first.y - second.y])
    return bool(shift @ side > np.abs(shift[side == 0]).item())


def _agreement(reading: _Reading, scene: Scene) -> int:
    """In how many points a reading agrees with the caption of a scene."""
    colours, shapes, sizes = (_holds(reading, scene, part) for part in ("colour", "shape", "size"))
    return sum(colours + shapes + sizes) + _relation_holds(reading, scene.relation)
