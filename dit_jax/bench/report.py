"""What a benchmark says: lines for people as they come, and the same as data."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def report(lines: Iterator[tuple[str, Any]], file: Path | None) -> None:
    """Print lines as they come, and write what they say as one JSON file: a list, in order."""
    said = []
    for line, data in lines:
        print(line, flush=True)
        said.append(data)
    if file:
        file.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
