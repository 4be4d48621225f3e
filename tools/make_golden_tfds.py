"""Writes the small TFDS data set of the tests: eight pictures of the shapes world with their captions and labels.

    python3.11 -m venv tfvenv && tfvenv/bin/pip install tensorflow-cpu tensorflow-datasets array_record \\
        importlib_resources
    tfvenv/bin/python -m tools.make_golden_tfds tests/data/golden/tfds

An environment of its own, as preparing needs TensorFlow and reading does not. The pictures lie in
``tests/data/golden/folder``, a folder with ``metadata.jsonl`` as users have one; ``draw`` has drawn them, once.

The class is also an example of how a folder of pictures becomes a TFDS data set.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "data" / "golden" / "folder"
COUNT, SIZE = 8, 32


def draw(folder: Path) -> None:
    """Draws the pictures; a label is colour and shape of what the caption names first."""
    from PIL import Image

    from dit_jax.data.shapes_world import ShapesWorld

    folder.mkdir(parents=True)
    world = ShapesWorld(0, COUNT, (1, 2), "seen")
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for i in range(COUNT):
            picture, (caption,), _ = world[i]
            name, first = f"{i:03}.png", world.scene(i).objects[0]
            Image.fromarray(picture).resize((SIZE, SIZE)).save(folder / name, optimize=True)
            row = {"file_name": name, "text": caption, "label": f"{first.colour}_{first.shape}"}
            metadata.write(json.dumps(row) + "\n")


def read_rows() -> list[dict[str, str]]:
    """The rows of ``metadata.jsonl``."""
    return [json.loads(line) for line in (FOLDER / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


class GoldenShapes(tfds.core.GeneratorBasedBuilder):
    """The pictures of ``FOLDER``, in its order."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(),
                    "caption": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=sorted({row["label"] for row in read_rows()})),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for i, row in enumerate(read_rows()):
            # Given a path, the file's bytes are kept as they are.
            yield i, {"image": str(FOLDER / row["file_name"]), "caption": row["text"], "label": row["label"]}


if __name__ == "__main__":
    GoldenShapes(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
