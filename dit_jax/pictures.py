"""Files of pictures that were drawn."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo


def make_grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size as a contact sheet, row by row."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def save_png(image: Image.Image, path: Path, info: dict[str, str]) -> None:
    """Write a PNG with text chunks."""
    chunks = PngInfo()
    for key, value in info.items():
        chunks.add_itxt(key, value)
    image.save(path, pnginfo=chunks)
