"""The same eight pictures with the same captions, in the same order, as sources of several kinds.

The pictures are those of ``golden/folder``, byte for byte; ``golden/tfds`` is what ``tools/make_golden_tfds.py`` has
made of them.
"""

import io
import json
import shutil
import tarfile
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"
FOLDER = GOLDEN / "folder"
TFDS = "tfds:golden_shapes?data_dir=" + str(GOLDEN / "tfds")


def rows() -> list[tuple[str, str]]:
    """File name and caption of every picture."""
    lines = (FOLDER / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [(row["file_name"], row["text"]) for row in map(json.loads, lines)]


def write_folder(into: Path) -> str:
    """As a folder; returns the user's word for it, as of all of these."""
    shutil.copytree(FOLDER, into)
    return f"folder:{into}"


def write_wds(into: Path) -> str:
    """As two tar shards."""
    into.mkdir(parents=True)
    half = (len(rows()) + 1) // 2
    for shard in (0, 1):
        with tarfile.open(into / f"{shard:05}.tar", "w") as tar:
            for name, caption in rows()[shard * half : (shard + 1) * half]:
                tar.add(FOLDER / name, name)
                text = tarfile.TarInfo(Path(name).stem + ".txt")
                text.size = len(caption.encode())
                tar.addfile(text, io.BytesIO(caption.encode()))
    return f"wds:{into}"


def write_hf(into: Path) -> str:
    """As a parquet file, which the library ``datasets`` opens."""
    import pyarrow
    import pyarrow.parquet

    into.mkdir(parents=True)
    images = [{"bytes": (FOLDER / name).read_bytes(), "path": name} for name, _ in rows()]
    table = pyarrow.table({"image": images, "text": [caption for _, caption in rows()]})
    pyarrow.parquet.write_table(table, into / "train.parquet")
    return f"hf:{into}"
