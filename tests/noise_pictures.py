"""Folders of captioned pictures of coloured noise, of any shapes, some of them broken."""

import json
from collections.abc import Container, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

WIDE, TALL, SQUARE = (96, 64), (64, 96), (64, 64)  # width, height


def draw_noise(folder: Path, sizes: Sequence[tuple[int, int]], bad: Container[int] = ()) -> str:
    """Pictures with one to three captions each; returns the user's word for the folder."""
    folder.mkdir()
    random = np.random.default_rng(0)
    rows = []
    for i, size in enumerate(sizes):
        name = f"{i:02}.png"
        if i in bad:
            (folder / name).write_bytes(b"no picture")
        else:
            small = Image.fromarray(random.integers(0, 255, (4, 4, 3), np.uint8))
            small.resize(size, Image.Resampling.BICUBIC).save(folder / name)
        captions = [f"a picture {i}", f"there is {i}", f"an image with {i}"]
        rows.append(json.dumps({"file_name": name, "text": captions[: 1 + i % 3]}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return f"folder:{folder}"
