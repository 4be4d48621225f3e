"""A cache with no pictures behind it, to measure with: as large as a real one, with captions as long as people's."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dit_jax.data.cache.files import begin, finish, write
from dit_jax.data.cache.parts import Identity, Pictures, Texts, Unit, tabulate, units

# Tokens of a caption, from BOS to EOS, are log-normal with this median and this deviation of their logarithm: 14 on
# average, as in COCO, with a tail that reaches the encoder's length once in a few thousand, as in captions of the web.
MEDIAN, SPREAD = 12.5, 0.5


class _Names:
    """As much of a source as a table is made of; every record has a caption of its own."""

    def __init__(self, records: int):
        self._records = records

    def __len__(self) -> int:
        return self._records

    def ids(self) -> Iterable[str]:
        return (f"{i:09}.jpg" for i in range(self._records))

    def captions(self) -> Iterable[tuple[str, ...]]:
        return ((f"a photo of the place with the number {i} on the map",) for i in range(self._records))


def make_up(folder: Path, records: int, making: dict[str, Any]) -> None:
    """Write a cache.

    Args:
      folder: a new one.
      records: how many it has.
      making: its identity without ``data``; pictures have one shape.
    """
    table = tabulate(_Names(records), np.zeros(records, np.uint8))  # type: ignore[arg-type]
    identity = making | {"data": {"name": "made up", "fingerprint": "", **table.counts(1)}}
    rng = np.random.default_rng(0)
    begin(folder, identity, table)
    for unit in units(identity):
        write(
            folder,
            identity,
            unit,
            _pictures(identity, unit, rng) if unit.kind == "pictures" else _texts(identity, unit, rng),
        )
    finish(folder, identity, lambda done, total: None)


def _pictures(identity: Identity, unit: Unit, rng: np.random.Generator) -> Pictures:
    """The same latents for all: they take as long to read."""
    shard = Pictures.zeros(identity, unit)
    shard.moments[:] = np.abs(rng.standard_normal(shard.moments.shape[1:], np.float32))
    return shard


def _texts(identity: Identity, unit: Unit, rng: np.random.Generator) -> Texts:
    text = identity["text_encoder"]
    tokens = np.clip(np.rint(rng.lognormal(np.log(MEDIAN), SPREAD, len(unit))), 3, text["length"]).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(tokens)])
    hidden = np.broadcast_to(
        rng.standard_normal(text["width"]).astype(ml_dtypes.bfloat16), (offsets[-1], text["width"])
    )
    pooled = np.ones((len(unit), text["pooled_width"]), ml_dtypes.bfloat16)
    return Texts(hidden, offsets, pooled)
