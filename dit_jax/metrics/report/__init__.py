"""``report.html``: a run on one page, to be looked at without a server, a network or this package.

It is made of what lies in the workdir, which it reads like anybody from outside: ``metrics.jsonl``, ``timing.jsonl``,
``samples/``, ``STATUS.json``, ``config.json`` and ``evaluation/``. A `Report` that lives as long as a run reads every
row and every picture once, and its page has a bounded size (`curves`, `grids`), so that writing it again costs the
same at the end of a long run as at its beginning.

A run never fails by its page: what cannot be read is said on it, and what cannot be written in a warning.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dit_jax.files import flatten, read_json, write_whole
from dit_jax.metrics.report.grids import Grids
from dit_jax.metrics.report.page import render
from dit_jax.metrics.report.panels import Facts
from dit_jax.metrics.report.record import Record
from dit_jax.workdir import STATUS

PAGE = "report.html"
METRICS_MOST = 16  # of evaluation/


class Report:
    """The page of a run.

    Args:
      folder: where the run writes.
      place: where the run lies: the same, or in a bucket.
      about: as the attribute.
      defaults: of the config, by dotted key; None where they are not installed.

    Attributes:
      about: what the run says of itself beside its config: versions, devices, parameters, hashes.
    """

    def __init__(self, folder: Path, place: Path, about: dict[str, Any], defaults: Mapping[str, Any] | None):
        self._folder, self._place, self.about = folder, place, about
        self._defaults = defaults or {}
        self._record = Record(folder)
        self._grids: Grids | None = None

    def write(self) -> str:
        """Write the page as things stand; returns a warning if that failed, else nothing."""
        try:
            write_whole(self._folder / PAGE, render(self._facts()))
        except Exception as error:  # whatever it is: the run is worth more than its page
            with suppress(OSError):  # on a full disk what was begun takes room that the run needs
                self._folder.joinpath(f"{PAGE}.tmp").unlink(missing_ok=True)
            return f"{PAGE} was not written: {' '.join(str(error).split())[:300] or type(error).__name__}"
        return ""

    def _facts(self) -> Facts:
        notes: list[str] = []
        self._record.read()
        for name, count in self._record.damaged.items():
            if count:
                notes.append(f"{name}: {count:,} damaged or misplaced rows were left out")
        if self._grids is None:
            self._grids = Grids(self._folder, self._place)
        pictures = self._grids.look()
        notes += [picture for _, picture in pictures if isinstance(picture, str)]
        config = flatten(self._read("config.json", notes))
        evaluation = self._folder / "evaluation"
        metrics = sorted(path.name for path in evaluation.glob("*.json"))[:METRICS_MOST] if evaluation.is_dir() else []
        return Facts(
            name=self._place.name,
            record=self._record,
            pictures=pictures,
            grids=self._grids.count,
            status=self._read(STATUS, notes),
            config={key: (value, self._default(key)) for key, value in config.items()},
            scores={name.removesuffix(".json"): self._read(f"evaluation/{name}", notes) for name in metrics},
            about=self.about,
            notes=notes,
        )

    def _default(self, key: str) -> Any:
        value = self._defaults.get(key)
        return list(value) if isinstance(value, tuple) else value  # as JSON has it

    def _read(self, name: str, notes: list[str]) -> dict[str, Any]:
        """A JSON object of the workdir; empty, with a note, if it cannot be read."""
        if not (self._folder / name).is_file():
            return {}
        try:
            found = read_json(self._folder / name)
            if isinstance(found, dict):
                return found
            notes.append(f"{name} holds no JSON object")
        except (OSError, ValueError) as error:
            notes.append(f"{name} cannot be read: {' '.join(str(error).split())[:200]}")
        return {}
