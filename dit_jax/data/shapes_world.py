"""The shapes world: an endless captioned data set drawn by a program, so that text fidelity can be measured.

A picture shows one to three flat shapes on a neutral background; its caption names the size, colour and
shape of each and how the first two stand to each other: "a small red circle above a large blue square".
Because the program knows what it drew, `dit_jax.metrics.shapes_checker` can say exactly which parts
of a caption a generated picture gets right.

Picture i of a seed is a pure function of (seed, i): nothing is stored and any picture can be drawn alone.
Centres lie on a coarse lattice around the middle of the picture, where photographers put things too: text is
what is measured here, and every further place multiplies the pictures that a small model must see. Backgrounds are
light: with black among them most of the variance of pictures lies in what no caption names, and outlines, which
captions do name, are a small part of what a denoiser's loss can see.
Six colour-shape combinations (`HELD_OUT`) are never drawn for training. Whether a model draws a
"red star" after seeing red things and stars, but never both in one, is a test of generalisation.

Coordinates are in pixels, x to the right and y downwards, with (0, 0) the corner of the picture.
"""

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from dit_jax.data.sources.records import Record

IMAGE_SIZE = 64
LATTICE = (16, 24, 32, 40, 48)  # px, where centres may lie on each axis
MIDDLE = (24, 32, 40)  # where they lie unless another object stands beside them
MIN_GAP = 4.0  # px between two objects, so that a blurred picture still shows two
RADIUS_JITTER = 0.75  # px; two of the largest objects and a gap still fit side by side
SUPERSAMPLING = 4

RADII = {"small": 8.0, "large": 13.0}  # px
COLOURS = {
    "red": (215, 25, 30),
    "green": (30, 160, 50),
    "blue": (40, 70, 220),
    "yellow": (250, 225, 40),
    "purple": (130, 40, 170),
    "orange": (240, 120, 10),
    "cyan": (30, 200, 215),
    "pink": (250, 120, 185),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "pale grey": (230, 230, 230),
    "light grey": (210, 210, 210),
    "grey": (190, 190, 190),
}
RELATIONS = {  # the side of the second object on which the first one lies
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
PHRASINGS = ("{}", "a picture of {}", "there is {}", "an image with {}")


def _star(points: int, inner: float) -> list[tuple[float, float]]:
    """Corners of a star whose notches lie at `inner` of the outer radius; inner = 1 gives a polygon."""
    angles = np.arange(2 * points) * np.pi / points
    radii = np.where(np.arange(2 * points) % 2 == 0, 1.0, inner)
    return list(zip(radii * np.sin(angles), -radii * np.cos(angles), strict=True))


def _fit(corners: list[tuple[float, float]], extent: float) -> np.ndarray:
    """Corners centred on their bounding box and scaled so that the longer half side is `extent`."""
    outline = np.asarray(corners)
    outline = outline - (outline.max(axis=0) + outline.min(axis=0)) / 2
    return outline * (extent / outline.max())


ARM = 0.36  # half the width of the cross's arms
OUTLINES = {  # corners [n, 2] of each shape of radius 1, inside the square [-1, 1]
    "circle": _fit(_star(24, inner=1.0), 1.0),
    "square": _fit([(-1, -1), (1, -1), (1, 1), (-1, 1)], 0.88),
    "triangle": _fit([(0, -1), (np.sqrt(3) / 2, 0.5), (-np.sqrt(3) / 2, 0.5)], 1.0),
    "diamond": _fit([(0, -1), (0.72, 0), (0, 1), (-0.72, 0)], 1.0),
    "star": _fit(_star(5, inner=0.46), 1.0),
    "cross": _fit(
        [(-ARM, -1), (ARM, -1), (ARM, -ARM), (1, -ARM), (1, ARM), (ARM, ARM),
         (ARM, 1), (-ARM, 1), (-ARM, ARM), (-1, ARM), (-1, -ARM), (-ARM, -ARM)], 1.0,
    ),
}  # fmt: skip

HELD_OUT = {
    ("purple", "circle"),
    ("green", "square"),
    ("orange", "triangle"),
    ("cyan", "diamond"),
    ("red", "star"),
    ("blue", "cross"),
}
COMBINATIONS = {
    "seen": [(c, s) for c in COLOURS for s in OUTLINES if (c, s) not in HELD_OUT],
    "new": sorted(HELD_OUT),
}

EVALUATION_SEED = 2**32  # seeds from here on belong to evaluation; those of a `ShapesWorld` are smaller


class EvaluationClass(NamedTuple):
    """The prompts of one score: their seed, numbers of objects and colour-shape combinations."""

    seed: int
    objects: tuple[int, ...]
    combinations: Literal["seen", "new"]


QUICK, FULL = 200, 1000  # prompts of each class that are scored
EVALUATION_CLASSES = {
    "one_object": EvaluationClass(EVALUATION_SEED, (1,), "seen"),
    "two_objects": EvaluationClass(EVALUATION_SEED + 1, (2,), "seen"),
    "new_combinations": EvaluationClass(EVALUATION_SEED + 2, (1,), "new"),
}


@dataclass(frozen=True)
class Object:
    """One shape: what its caption says of it, and where it lies (centre and radius in pixels)."""

    size: str
    colour: str
    shape: str
    x: float
    y: float
    radius: float

    @property
    def outline(self) -> np.ndarray:
        """Corners `[n, 2]` in pixels."""
        return OUTLINES[self.shape] * self.radius + (self.x, self.y)

    @property
    def phrase(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `relation` says how objects[0] stands to objects[1]; None for one object."""

    objects: tuple[Object, ...]
    relation: str | None
    background: str
    caption: str


class ShapesWorld:
    """A source of `num_pictures` captioned pictures of the shapes world.

    Args:
      seed: 0 <= seed < EVALUATION_SEED; another seed is another, independent set of pictures.
      num_pictures: length of the source; picture i does not depend on it.
      objects: numbers of objects of a picture, each equally often; a selection of 1, 2 and 3.
      combinations: "seen" never shows a colour-shape combination of `HELD_OUT`, "new" shows only those.

    Raises:
      ValueError: an argument is none of the above.
    """

    def __init__(
        self, seed: int, num_pictures: int, objects: Sequence[int], combinations: Literal["seen", "new"]
    ) -> None:
        if not 0 <= seed < EVALUATION_SEED:
            raise ValueError(f"seed of the shapes world is {seed}; it must be in [0, {EVALUATION_SEED})")
        if not 0 < num_pictures <= 2**32:
            raise ValueError(f"num_pictures is {num_pictures}; it must be in [1, {2**32}]")
        if not objects or not set(objects) <= {1, 2, 3}:
            raise ValueError(f"objects is {objects}; it must be a non-empty selection of 1, 2 and 3")
        if combinations not in COMBINATIONS:
            raise ValueError(f"combinations is {combinations!r}; choose one of {sorted(COMBINATIONS)}")
        self.name = "shapes"
        self.seed = seed
        self.objects = tuple(objects)
        self.combinations = combinations
        self._num_pictures = num_pictures

    def __len__(self) -> int:
        return self._num_pictures

    def __getitem__(self, i: int) -> Record:
        """Picture i and its caption. Raises IndexError outside the source."""
        scene = self.scene(i)
        return Record(render(scene), (scene.caption,), f"shapes:{self.seed}:{i}")

    def scene(self, i: int) -> Scene:
        """What picture i shows. Raises IndexError outside the source."""
        if not 0 <= i < len(self):
            raise IndexError(f"picture {i} of a shapes world of {len(self)}")
        return draw_scene(self.seed, i, self.objects, self.combinations)

    def ids(self) -> Iterable[str]:
        """The id of every picture, in order."""
        return (f"shapes:{self.seed}:{i}" for i in range(len(self)))

    def size(self, i: int) -> tuple[int, int]:
        """Height and width of every picture."""
        return IMAGE_SIZE, IMAGE_SIZE

    def captions(self) -> Iterable[tuple[str, ...]]:
        """The caption of every picture, in order."""
        return ((self.scene(i).caption,) for i in range(len(self)))

    def fingerprint(self) -> str:
        """Changes with anything that changes a picture or caption.

        The first few pictures are part of it, so that other drawing rules, or another version of numpy or
        Pillow that draws differently, give another fingerprint too.
        """
        digest = hashlib.sha256()
        digest.update(repr((self.seed, len(self), self.objects, self.combinations)).encode())
        for i in range(min(16, len(self))):
            record = self[i]
            digest.update(record.image.tobytes() + record.captions[0].encode())
        return digest.hexdigest()


def evaluation_scenes(class_name: str, count: int) -> list[Scene]:
    """The first `count` scenes of a class of prompts, from a seed that no training source can have.

    Raises:
      ValueError: `class_name` is not a key of `EVALUATION_CLASSES`.
    """
    if class_name not in EVALUATION_CLASSES:
        raise ValueError(f"evaluation class is {class_name!r}; choose one of {sorted(EVALUATION_CLASSES)}")
    seed, objects, combinations = EVALUATION_CLASSES[class_name]
    return [draw_scene(seed, i, objects, combinations) for i in range(count)]


def draw_scene(seed: int, i: int, num_objects: Sequence[int], combinations: Literal["seen", "new"]) -> Scene:
    """Scene i of a seed: attributes first, each uniform and independent, then positions that suit them."""
    # numpy joins the 32-bit words of both numbers. With i < 2**32 in front no two pairs give the same words.
    rng = np.random.default_rng((i, seed))
    count = _choose(rng, num_objects)
    pool = COMBINATIONS[combinations]
    looks = [pool[k] for k in rng.choice(len(pool), size=count, replace=False)]  # no two alike
    sizes = [_choose(rng, list(RADII)) for _ in looks]
    radii = [RADII[size] + rng.uniform(-RADIUS_JITTER, RADIUS_JITTER) for size in sizes]
    relation = _choose(rng, list(RELATIONS)) if count > 1 else None
    background = _choose(rng, list(BACKGROUNDS))
    phrasing = _choose(rng, PHRASINGS)

    halves = [OUTLINES[shape].max(axis=0) * radius for (_, shape), radius in zip(looks, radii, strict=True)]
    centres = _lay_out(rng, halves, relation)
    objects = tuple(
        Object(size, colour, shape, float(x), float(y), float(radius))
        for size, (colour, shape), radius, (x, y) in zip(sizes, looks, radii, centres, strict=True)
    )
    return Scene(objects, relation, background, caption(objects, relation, phrasing))


def caption(objects: Sequence[Object], relation: str | None, phrasing: str) -> str:
    """The sentence for one to three objects: "A", "A above B" or "A above B, and C" inside a phrasing."""
    words = objects[0].phrase
    if len(objects) > 1:
        words += f" {relation} {objects[1].phrase}"
    if len(objects) > 2:
        words += f", and {objects[2].phrase}"
    return phrasing.format(words)


def render(scene: Scene) -> np.ndarray:
    """Draw a scene, anti-aliased: uint8 `[IMAGE_SIZE, IMAGE_SIZE, 3]`."""
    large = (IMAGE_SIZE * SUPERSAMPLING, IMAGE_SIZE * SUPERSAMPLING)
    image = Image.new("RGB", large, BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(image)
    for item in scene.objects:
        corners = item.outline * SUPERSAMPLING  # Pillow rounds down, to the pixel that a corner lies in
        draw.polygon(corners.ravel().tolist(), fill=COLOURS[item.colour])
    return np.asarray(image.reduce(SUPERSAMPLING))


def _choose(rng: np.random.Generator, choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]


def _lay_out(rng: np.random.Generator, halves: list[np.ndarray], relation: str | None) -> np.ndarray:
    """Centres `[n, 2]` of objects with bounding boxes of half sides `halves`, true to the relation.

    A pair stands on one line along the axis of its relation; a third object lies on one side of that line.
    """
    centres = np.array([[_choose(rng, MIDDLE), _choose(rng, MIDDLE)] for _ in halves], np.float64)
    if relation is None:
        return centres
    axis = 0 if RELATIONS[relation][0] else 1
    across = 1 - axis
    pair = [0, 1] if RELATIONS[relation][axis] < 0 else [1, 0]
    centres[pair, axis] = _place_two(rng, *(halves[k][axis] for k in pair))
    centres[1, across] = centres[0, across]
    for third in range(2, len(halves)):
        line = max(halves[0][across], halves[1][across])
        if rng.integers(2):
            centres[:2, across], centres[third, across] = _place_two(rng, line, halves[third][across])
        else:
            centres[third, across], centres[:2, across] = _place_two(rng, halves[third][across], line)
    return centres


def _place_two(rng: np.random.Generator, first: float, second: float) -> tuple[int, int]:
    """Coordinates of one object before another, which reach `first` and `second` px to both sides."""
    return _choose(rng, [(a, b) for a, b in itertools.combinations(LATTICE, 2) if b - a >= first + MIN_GAP + second])
