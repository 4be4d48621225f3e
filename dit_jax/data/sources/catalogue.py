"""From the user's word for data to what it stands for.

    KIND:PLACE?option=value&option=value            folder:cats    hf:owner/name?split=train&caption=text
    0.7*KIND:PLACE + 0.3*KIND:PLACE                 drawn by weight; without a number the weight is 1

`KINDS` lists the kinds with their options. A source of a kind and the library it may need are imported when they are
asked for.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from dit_jax.data.sources.records import Mixture, Source, split, split_indices
from dit_jax.errors import ConfigError

if TYPE_CHECKING:
    from dit_jax.data.cache.gather import Cache


class Part(NamedTuple):
    """One source of what the user asked for, with every option of its kind."""

    weight: float
    kind: str
    place: str
    options: dict[str, str]

    def __str__(self) -> str:
        return f"{self.kind}:{self.place}" if self.place else self.kind


class Kind(NamedTuple):
    """What a word before the colon stands for.

    Attributes:
      place: what stands behind the colon.
      open: called with the place and, by name, the options.
      options: with what they are where the user says nothing; empty: whatever is usual there.
    """

    place: str
    open: "Callable[..., Source | Cache]"
    options: dict[str, str]


def open_source(
    text: str, shapes: Callable[[], Source], fraction: float, part: Literal["train", "validation", "all"]
) -> "Source | Cache":
    """Opens what the user asked for, or a part of it.

    Args:
      text: as in the head of this file.
      shapes: makes the shapes world, which has no place: a config says what it is like.
      fraction: of the records that are set aside as validation; of every source of a mixture.
      part: what to take; ``all``: nothing is set aside.

    Returns:
      A source; or a cache, where all that is mixed are caches.

    Raises:
      ConfigError: a wrong word, or sources mixed with caches.
      DataError: data that are not there or cannot be read.
    """
    from dit_jax.data.cache.gather import Cache, join

    parts = parse(text)
    weights = [one.weight for one in parts]
    opened = [shapes() if one.kind == SHAPES else KINDS[one.kind].open(one.place, **one.options) for one in parts]
    caches = [one for one in opened if isinstance(one, Cache)]
    sources = [one for one in opened if not isinstance(one, Cache)]
    if caches and sources:
        raise ConfigError(f"data.source is {text!r}: caches can be mixed with caches only; make one of the rest too")
    if part != "all":  # before mixing, so that every source keeps its weight in either part
        sources = [split(source, fraction, part) for source in sources]
        caches = [cache.select(split_indices(cache.ids(), len(cache), fraction, part)) for cache in caches]
    if caches:
        return caches[0] if len(caches) == 1 else join(caches, weights, [one.place for one in parts])
    return sources[0] if len(sources) == 1 else Mixture(sources, weights)


# --- the kinds ----------------------------------------------------------------------------------------------


def _folder(place: str) -> Source:
    from dit_jax.data.sources.folder import Folder

    return Folder(place)


def _manifest(kind: str) -> Callable[..., Source]:
    def open_it(place: str, **options: str) -> Source:
        from dit_jax.data.sources.manifests import open_manifest

        return open_manifest(kind, place, **options)

    return open_it


def _coco(place: str, **options: str) -> Source:
    from dit_jax.data.sources.manifests import open_coco

    return open_coco(place, **options)


def _wds(place: str) -> Source:
    from dit_jax.data.sources.wds import open_wds

    return open_wds(place)


def _tfds(place: str, **options: str) -> Source:
    from dit_jax.data.sources.tfds import open_tfds

    return open_tfds(place, **options)


def _hf(place: str, **options: str) -> Source:
    from dit_jax.data.sources.hf import open_hf

    return open_hf(place, **options)


def _cache(place: str) -> "Cache":
    from dit_jax.data.cache.files import open_cache

    return open_cache(Path(place).expanduser())


SHAPES = "shapes"  # the one kind without a place
COLUMNS = {"image": "", "caption": ""}
CLASSES = {"label": "", "template": "a photo of a {}"}  # captions made of the names of classes

KINDS = {
    "folder": Kind("PATH", _folder, {}),
    "jsonl": Kind("FILE", _manifest("jsonl"), COLUMNS),
    "csv": Kind("FILE", _manifest("csv"), COLUMNS),
    "parquet": Kind("FILE_OR_FOLDER", _manifest("parquet"), COLUMNS),
    "coco": Kind("CAPTIONS.json", _coco, {"images": ""}),
    "wds": Kind("TARS", _wds, {}),
    "tfds": Kind("NAME", _tfds, {"split": "train", **COLUMNS, **CLASSES, "data_dir": ""}),
    "hf": Kind("OWNER/NAME_OR_FOLDER", _hf, {"subset": "", "split": "train", **COLUMNS, **CLASSES}),
    "cache": Kind("FOLDER", _cache, {}),
}


# --- the word -----------------------------------------------------------------------------------------------

WEIGHT = re.compile(r"\s*([^:*/]*)\*(.*)", re.DOTALL)


def parse(text: str) -> list[Part]:
    """Reads the user's word; opens nothing.

    Raises:
      ConfigError: it is none; the error lists what it can be.
    """
    return list(_parts(text))


def _parts(text: str) -> Iterator[Part]:
    for word in text.split(" + "):
        weight, rest = 1.0, word.strip()
        if found := WEIGHT.fullmatch(word):
            weight, rest = _weight(text, found[1]), found[2].strip()
        head, _, tail = rest.partition("?")
        kind, _, place = head.partition(":")
        if kind == SHAPES and not place and not tail:
            yield Part(weight, kind, place, {})
            continue
        if kind not in KINDS or not place:
            raise ConfigError(f"data.source is {text!r}{_hint(kind, rest)}; it can be {_choices()}")
        yield Part(weight, kind, place, KINDS[kind].options | _options(text, kind, tail))


def _weight(text: str, number: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ConfigError(
            f"data.source is {text!r}: the weight {number!r} must be a number above 0, as in 0.7*folder:cats"
        )
    return weight


def _options(text: str, kind: str, tail: str) -> dict[str, str]:
    options = {}
    for pair in filter(None, tail.split("&")):
        name, equals, value = pair.partition("=")
        known = KINDS[kind].options
        if name not in known or not equals:
            there_are = f"its options are {', '.join(f'{option}=' for option in known)}" if known else "it has none"
            raise ConfigError(f"data.source is {text!r}: {pair!r} is no option of {kind}; {there_are}")
        options[name] = value
    return options


def _choices() -> str:
    return ", ".join([SHAPES, *(f"{kind}:{KINDS[kind].place}" for kind in KINDS)])


# What lies at a path that was given without its kind.
SUFFIXES = {".jsonl": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".json": "coco", ".tar": "wds"}


def _hint(kind: str, word: str) -> str:
    """What the user may have meant."""
    path = Path(word).expanduser()
    if word and path.is_dir():
        is_cache = (path / "manifest.json").is_file()
        return f" (did you mean {'cache' if is_cache else 'folder'}:{word}?)"
    if path.is_file() and path.suffix.lower() in SUFFIXES:
        return f" (did you mean {SUFFIXES[path.suffix.lower()]}:{word}?)"
    close = difflib.get_close_matches(kind, [SHAPES, *KINDS], n=1)
    return f" (did you mean {close[0]!r}?)" if close and close[0] != kind else ""
