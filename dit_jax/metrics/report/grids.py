"""The pictures of a page: few, and small enough to stand in it.

Of the grids of samples every 2^k-th is kept, and the last: at most `MOST` + 1. Each is a JPEG at most `EDGE` pixels
wide and high, and at most `BYTES` long: coarser, then smaller, until it is.
"""

import base64
import io
import re
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from dit_jax import stores
from dit_jax.metrics.report.curves import Sparse

FOLDER = "samples"
MOST, EDGE, BYTES = 24, 1024, 256 * 1024
QUALITIES = (88, 75, 60, 40)
NAME = re.compile(r"(\d{8,16})\.png")
PROMPTS, LETTERS = 64, 400  # of the words beside a grid


class Picture(NamedTuple):
    """A picture that stands in the page: as a ``data:`` address, its size, and what its file says of it."""

    data: str
    width: int
    height: int
    prompts: list[str]
    seeds: str


class Grids:
    """The grids of samples of a run; each is read once.

    Args:
      folder: where the run writes.
      place: where the run lies: the same, or in a bucket.
    """

    def __init__(self, folder: Path, place: Path):
        self._folder, self._place = folder, place
        self._steps = Sparse(MOST)
        self._last = -1
        self._pictures: dict[int, Picture | str] = {}
        self._elsewhere = set() if folder == place else {_step(name) for name in _names_in(place)}

    def look(self) -> list[tuple[int, Picture | str]]:
        """The kept grids there are now, by step; in place of one that cannot be read, why."""
        here = (self._folder / FOLDER).glob("*.png") if (self._folder / FOLDER).is_dir() else ()
        steps = {_step(path.name) for path in here} | self._elsewhere
        for step in sorted(step for step in steps if step > self._last):
            self._steps.add(step)
            self._last = step
        kept = self._steps.items()
        self._pictures = {step: self._pictures.get(step) or self._read(step) for step in kept}
        return list(self._pictures.items())

    @property
    def count(self) -> int:
        """How many there are, kept or not."""
        return self._steps.count

    def _read(self, step: int) -> Picture | str:
        name = f"{FOLDER}/{step:08d}.png"
        path = self._folder / name
        try:
            return read_picture(path if path.is_file() else self._place / name)
        except Exception as error:  # however Pillow, or the way to a bucket, trips over it
            return f"{name} cannot be read: {' '.join(str(error).split())[:200] or type(error).__name__}"


def read_picture(path: Path) -> Picture:
    """A PNG file made small."""
    with path.open("rb") as file, Image.open(file, formats=["PNG"]) as image:
        image.load()
        said = {key: value for key, value in image.info.items() if isinstance(value, str)}
        small = image.convert("RGB")
    small.thumbnail((EDGE, EDGE), Image.Resampling.LANCZOS)
    prompts = [line[:LETTERS] for line in said.get("prompt", "").split("\n")[:PROMPTS] if line]
    data = base64.b64encode(_jpeg(small)).decode("ascii")
    return Picture(f"data:image/jpeg;base64,{data}", *small.size, prompts, said.get("seed", "")[:LETTERS])


def _jpeg(image: Image.Image) -> bytes:
    """At most `BYTES`; the colours of flat pictures do not bleed, as they are kept as finely as the light."""
    while True:
        for quality in QUALITIES:
            written = io.BytesIO()
            image.save(written, "JPEG", quality=quality, subsampling=0)
            if written.tell() <= BYTES:
                return written.getvalue()
        image = image.resize((max(image.width // 2, 1), max(image.height // 2, 1)), Image.Resampling.LANCZOS)


def _names_in(place: Path) -> list[str]:
    start = f"{FOLDER}/"
    names = (name.removeprefix(start) for name in stores.files_of(place) if name.startswith(start))
    return [name for name in names if NAME.fullmatch(name)]


def _step(name: str) -> int:
    found = NAME.fullmatch(name)
    return int(found[1]) if found else -1
