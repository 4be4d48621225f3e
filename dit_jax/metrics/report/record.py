"""What the numbers of a run say: its rows are read once, as they come, however often they are asked for.

    metrics.jsonl  loss  grad_norm  learning_rate  loss_scale  skipped  validation_x0_error[/log_snr=K]
    timing.jsonl   images_per_second  data_wait  memory_gib  mfu

What is no row, has no step, or a step that is not behind the one before it in its series, is left out and counted.
"""

import json
import math
import re
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

from dit_jax.files import bounded_lines
from dit_jax.metrics.report.curves import Curve, Sparse
from dit_jax.workdir import METRICS, TIMING

TRAINING = ("loss", "grad_norm", "learning_rate", "loss_scale")
SPEED = ("images_per_second", "data_wait", "memory_gib", "mfu")
VALIDATION = "validation_x0_error"
LEVEL = re.compile(rf"{VALIDATION}/log_snr=(-?\d{{1,3}})")
LEVELS_MOST, LEVEL_BUCKETS = 64, 64  # curves of the error at one level of noise, and how finely each is kept
LARGEST = 1e30  # what is larger cannot be drawn, and counts as not finite
STEPS = 2**53
SKIPS_SHOWN = 100


class Skips(NamedTuple):
    """Steps that were skipped between two rows."""

    after: int
    until: int
    steps: int


class Record:
    """The numbers of a run.

    Attributes:
      curves: by name; those of `VALIDATION` by level are in ``levels``.
      levels: curves of the validation error by log-SNR.
      profiles: ``(step, {log-SNR: error})`` of some validations, spread over the run.
      skips: where steps were skipped lately.
      skipped: how many in all.
      not_finite: rows whose loss is no number.
      damaged: lines that were left out, by file.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._places: dict[str, int] = {}  # how far each file was read
        self._anew()

    def _anew(self) -> None:
        self.curves = {name: Curve() for name in (*TRAINING, VALIDATION, *SPEED)}
        self.levels: dict[int, Curve] = {}
        self.profiles = Sparse(6)
        self.skips: deque[Skips] = deque(maxlen=SKIPS_SHOWN)
        self.skipped = self.not_finite = self.last_step = 0
        self._skipped_at = 0
        self.damaged = {METRICS: 0, TIMING: 0}

    def read(self) -> None:
        """Read what was written since the last time; all, if a file became shorter."""
        sizes = {name: _size(self._folder / name) for name in (METRICS, TIMING)}
        if any(sizes[name] < place for name, place in self._places.items()):
            self._anew()
            self._places = {}
        for name in sizes:
            self._places[name] = self._read(name, self._places.get(name, 0))

    def _read(self, name: str, place: int) -> int:
        """Read a file from a place, and return the place behind its last whole line."""
        path = self._folder / name
        if not path.is_file():
            return 0
        with path.open("rb") as file:
            file.seek(place)
            for line in bounded_lines(file):
                if line is not None and not line.endswith(b"\n"):
                    break  # torn, or not all of it is written yet
                place = file.tell()
                if not self._take(name, line or b""):
                    self.damaged[name] += 1
        return place

    def _take(self, file: str, line: bytes) -> bool:
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            return False
        step = row.get("step") if isinstance(row, dict) else None
        if type(step) is not int or not 0 <= step <= STEPS:
            return False
        self.last_step = max(self.last_step, step)
        names = SPEED if file == TIMING else (*TRAINING, VALIDATION)
        behind = [self.curves[name].add(step, row[name]) for name in names if _is_number(row.get(name))]
        if file == METRICS:
            if "loss" in row and not _is_number(row["loss"]):
                self.not_finite += 1
            self._take_levels(step, row)
            self._take_skips(step, row)
        return all(behind)

    def _take_levels(self, step: int, row: dict[str, Any]) -> None:
        named = ((LEVEL.fullmatch(name), value) for name, value in row.items() if _is_number(value))
        found = {int(match[1]): value for match, value in named if match}
        for level, value in found.items():
            if level in self.levels or len(self.levels) < LEVELS_MOST:
                self.levels.setdefault(level, Curve(LEVEL_BUCKETS)).add(step, value)
        if len(found) > 1:
            self.profiles.add((step, dict(sorted(found.items()))))

    def _take_skips(self, step: int, row: dict[str, Any]) -> None:
        if type(skipped := row.get("skipped")) is int:
            if skipped > self.skipped:
                self.skips.append(Skips(self._skipped_at, step, skipped - self.skipped))
                self.skipped = skipped
            self._skipped_at = step


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= LARGEST


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
