"""What the embedded encoders learn from: the shapes world and a folder of real pictures with captions.

Everything is kept in memory as uint8. Neither network ever sees a held-out colour-shape combination, nor a
picture of the folder that `split` puts into its validation part.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from dit_jax.data.shapes_world import IMAGE_SIZE, Scene, ShapesWorld, render
from dit_jax.data.sources.folder import Folder
from dit_jax.data.sources.records import BadRecord, Record, Source, split

VALIDATION_FRACTION = 0.1  # of the folder
FOLDER_SIZE = 128  # px; side of the pictures of the folder


class Captioned(NamedTuple):
    """Real pictures uint8 `[n, FOLDER_SIZE, FOLDER_SIZE, 3]`, laid on white, and their captions."""

    images: np.ndarray
    captions: list[str]


def read_folder(path: str | Path, part: Literal["train", "validation"]) -> Captioned:
    """One part of the folder.

    Raises:
      ValueError: a picture has another size than FOLDER_SIZE.
    """
    records = list(_good_records(split(Folder(path), VALIDATION_FRACTION, part)))
    for record in records:
        if record.image.shape != (FOLDER_SIZE, FOLDER_SIZE, 3):
            raise ValueError(f"{record.id} is {record.image.shape[:2]}, expected {FOLDER_SIZE} x {FOLDER_SIZE}")
    return Captioned(np.stack([record.image for record in records]), [record.captions[0] for record in records])


def _good_records(source: Source) -> Iterator[Record]:
    for i in range(len(source)):
        try:
            yield source[i]
        except BadRecord as error:
            print(f"left out {error}")


def shapes(seed: int, count: int, objects: tuple[int, ...]) -> tuple[list[Scene], np.ndarray]:
    """`count` scenes without held-out combinations, and their pictures uint8 `[count, 64, 64, 3]`."""
    world = ShapesWorld(seed, count, objects, "seen")
    scenes = [world.scene(i) for i in range(count)]
    return scenes, np.stack([render(scene) for scene in scenes])


def with_hard_half(scenes: list[Scene], images: np.ndarray) -> np.ndarray:
    """The pictures that show a small star or a small cross, and as many of the others.

    Their notches are a pixel or two wide: the last thing that a VAE learns, and rare in an even mixture.
    """
    hard = np.array([any(o.size == "small" and o.shape in ("star", "cross") for o in s.objects) for s in scenes])
    return np.concatenate([images[hard], images[~hard][: hard.sum()]])


def random_cut(rng: np.random.Generator, image: np.ndarray, side: int) -> np.ndarray:
    """A random square of a real picture, `side` px wide, at the size of the shapes world."""
    left, top = rng.integers(0, FOLDER_SIZE - side + 1, size=2)
    square = image[top : top + side, left : left + side]
    if side == IMAGE_SIZE:
        return square
    return np.asarray(Image.fromarray(square).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS))


def recolour(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """The same drawing in other colours: mirrored, channels permuted, sometimes as its negative."""
    if rng.random() < 0.5:
        image = image[:, ::-1]
    if rng.random() < 0.5:
        image = image[..., rng.permutation(3)]
    return 255 - image if rng.random() < 0.15 else image


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[-1, 1] to uint8, clipped and rounded."""
    return np.clip(np.round((np.asarray(images) + 1) * 127.5), 0, 255).astype(np.uint8)
