"""Files of pictures that were drawn: a folder of PNG files, or one archive.

    pictures/  00000.png 00001.png ... grid.png       prompt, seed, step and digest in the text chunks of each
    x.npz      images  seeds  prompts  settings       until all are drawn, in parts: x.npz.parts/00000.npz ...

Many pictures are drawn batch by batch and written as they come. The digest of a batch covers all that decides its
pictures, to the last bit: the model, the settings, and who shares the batch. What is on disk with the same digest is
not drawn again, so that a killed command, given again, ends with the files of one that never stopped.
"""

import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dit_jax.drawing.pipeline import BATCHES
from dit_jax.errors import ConfigError

BATCH = BATCHES[-1]  # pictures that are drawn and written together
IN_GRID = 64  # pictures in grid.png, the first ones
GRID = "grid.png"
NUMBERED = re.compile(r"\d{5,}\.png")
UNFINISHED = re.compile(r"(\d{5,}|grid)\.png\.tmp")


class Batch(NamedTuple):
    """Pictures that are drawn together.

    Attributes:
      number: from 0.
      prompts, seeds: of each picture.
      digest: of all that decides them.
    """

    number: int
    prompts: list[str]
    seeds: list[int]
    digest: str

    @property
    def numbers(self) -> range:
        """Of its pictures, among all."""
        return range(self.number * BATCH, self.number * BATCH + len(self.prompts))


def cut_into_batches(prompts: Sequence[str], seeds: Sequence[int], settings: dict[str, Any]) -> list[Batch]:
    """The batches of a drawing; ``settings`` are what decides a picture beside its prompt and seed."""
    batches = []
    for number in range(-(-len(prompts) // BATCH)):
        rows = slice(number * BATCH, (number + 1) * BATCH)
        ours, theirs = list(prompts[rows]), [int(seed) for seed in seeds[rows]]
        batches.append(Batch(number, ours, theirs, _digest([settings, ours, theirs])))
    return batches


class Folder:
    """A drawing as PNG files in a folder.

    Pictures of another drawing of ours that lie there are replaced once the first new ones are drawn.

    Args:
      folder: is made where it is not there.
      batches: of the drawing.
      step: of the model's training, written into the files.
      columns: of the grid.

    Raises:
      ConfigError: something lies there that we did not write, and that would be replaced or mixed up with ours.
    """

    def __init__(self, folder: Path, batches: Sequence[Batch], step: int, columns: int):
        self._folder, self._step, self._columns = folder, str(step), columns
        self._count = sum(len(batch.prompts) for batch in batches)
        folder.mkdir(parents=True, exist_ok=True)
        wanted = {self.path(i).name: chunks for batch in batches for i, chunks in self._chunks(batch)}
        self._there, self._stale, foreign = set(), [], []
        for path in sorted(folder.iterdir()):
            ours = {"step"} if path.name == GRID else {"prompt", "seed", "step"}
            found = _read_chunks(path, ours) if path.name == GRID or NUMBERED.fullmatch(path.name) else None
            if path.name == GRID and found is not None:
                continue
            if found is not None and found == wanted.get(path.name):
                self._there.add(path.name)
            elif found is not None or UNFINISHED.fullmatch(path.name):
                self._stale.append(path)
            else:
                foreign.append(path)
        replaced = [path for path in self._stale if NUMBERED.fullmatch(path.name)]
        in_the_way = [path for path in foreign if replaced or path.name in {*wanted, GRID}]
        if in_the_way:
            raise ConfigError(f"{folder} holds {in_the_way[0].name}, which no drawing wrote; choose another --output")
        if replaced:
            print(f"{folder}: {len(replaced)} pictures of other prompts or settings will be replaced", flush=True)

    def path(self, i: int) -> Path:
        """Where picture i lies."""
        return self._folder / f"{i:05d}.png"

    def has(self, batch: Batch) -> bool:
        """Whether every picture of a batch is there."""
        return all(self.path(i).name in self._there for i in batch.numbers)

    def write(self, batch: Batch, pixels: np.ndarray) -> None:
        """Keep the pictures of a batch, uint8 ``[n, height, width, 3]``."""
        self._remove_stale()
        for (i, chunks), picture in zip(self._chunks(batch), pixels, strict=True):
            save_png(Image.fromarray(picture), self.path(i), chunks)

    def close(self) -> str:
        """Draw the grid, once every picture is there; returns what there is now, in a line."""
        self._remove_stale()
        images = []
        for i in range(min(self._count, IN_GRID)):
            with Image.open(self.path(i)) as image:
                images.append(image.convert("RGB"))
        save_png(make_grid(images, self._columns), self._folder / GRID, {"step": self._step})
        first = f", the first {IN_GRID} in the grid" if self._count > IN_GRID else ""
        return f"{self._folder / GRID}  {self._count} pictures{first}"

    def _chunks(self, batch: Batch) -> list[tuple[int, dict[str, str]]]:
        """Of every picture of a batch its number and its text chunks."""
        rows = zip(batch.numbers, batch.prompts, batch.seeds, strict=True)
        return [
            (i, {"prompt": prompt, "seed": str(seed), "step": self._step, "digest": batch.digest})
            for i, prompt, seed in rows
        ]

    def _remove_stale(self) -> None:
        for path in self._stale:
            path.unlink(missing_ok=True)
        self._stale = []


class Archive:
    """A drawing as one ``.npz``, whole or not there; until then its parts lie beside it.

    Args:
      path: of the archive.
      batches: of the drawing.
      settings: what decides a picture beside its prompt and seed; kept in the archive as JSON.

    Raises:
      ConfigError: the archive is there and holds another drawing.
    """

    def __init__(self, path: Path, batches: Sequence[Batch], settings: dict[str, Any]):
        self._path, self._batches = path, batches
        self._parts = path.with_name(path.name + ".parts")
        self._settings = json.dumps({**settings, "digest": _digest([batch.digest for batch in batches])})
        self._whole = path.exists()
        if self._whole and _read_array(path, "settings") != self._settings:
            raise ConfigError(f"{path} holds other pictures; choose another --output")
        self._parts.mkdir(parents=True, exist_ok=True)
        found = {file.name: _read_array(file, "digest") for file in sorted(self._parts.glob("*.npz"))}
        self._there = {batch.number for batch in batches if found.get(self._part(batch).name) == batch.digest}
        if other := len(found) - len(self._there):
            print(f"{self._parts}: {other} parts of other prompts or settings are drawn again", flush=True)

    def has(self, batch: Batch) -> bool:
        """Whether the pictures of a batch are kept."""
        return self._whole or batch.number in self._there

    def write(self, batch: Batch, pixels: np.ndarray) -> None:
        """Keep the pictures of a batch, uint8 ``[n, height, width, 3]``."""
        part = self._part(batch)
        temporary = part.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.savez(file, images=pixels, digest=np.array(batch.digest))
        os.replace(temporary, part)

    def close(self) -> str:
        """Join the parts, one after the other; returns what there is now, in a line."""
        seeds = [seed for batch in self._batches for seed in batch.seeds]
        if not self._whole:
            temporary = self._path.with_name(self._path.name + ".tmp")
            prompts = [prompt for batch in self._batches for prompt in batch.prompts]
            rows = {"seeds": np.array(seeds, np.int64), "prompts": np.array(prompts)}
            with zipfile.ZipFile(temporary, "w") as archive:
                self._join_images(archive, len(seeds))
                for name, array in {**rows, "settings": np.array(self._settings)}.items():
                    with archive.open(_member(name), "w", force_zip64=True) as file:
                        np.lib.format.write_array(file, array, allow_pickle=False)
            os.replace(temporary, self._path)
        shutil.rmtree(self._parts)
        return f"{self._path}  {len(seeds)} pictures"

    def _join_images(self, archive: zipfile.ZipFile, count: int) -> None:
        with archive.open(_member("images"), "w", force_zip64=True) as file:
            for batch in self._batches:
                images = _read_array(self._part(batch), "images")
                if batch.number == 0:
                    shape = (count, *images.shape[1:])
                    header = {"descr": images.dtype.str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(images.tobytes())

    def _part(self, batch: Batch) -> Path:
        return self._parts / f"{batch.number:05d}.npz"


def make_grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size as a contact sheet, row by row; of fewer pictures than columns it is one row."""
    columns = min(columns, len(images))
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def save_png(image: Image.Image, path: Path, info: dict[str, str]) -> None:
    """Write a PNG with text chunks, whole or not at all."""
    chunks = PngInfo()
    for key, value in info.items():
        chunks.add_itxt(key, value)
    temporary = path.with_name(path.name + ".tmp")
    image.save(temporary, "PNG", pnginfo=chunks)
    os.replace(temporary, path)


def _read_chunks(path: Path, ours: set[str]) -> dict[str, str] | None:
    """The text chunks of a picture; None of a file that lacks those that we write."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            found = {str(key): str(value) for key, value in image.info.items()}
    except Exception:  # what is damaged is drawn again, however Pillow trips over it
        return None
    return found if found.keys() >= ours else None


def _read_array(path: Path, name: str) -> Any:
    """An array of an archive, a text as it is; None where there is no such thing."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            array = archive[name]
    except Exception:  # what is damaged is drawn again, whatever zipfile and numpy trip over in it
        return None
    return array if array.ndim else str(array)


def _member(name: str) -> zipfile.ZipInfo:
    """An array of an archive; of no date, so that the same pictures make the same file."""
    return zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
