"""Of the files of a repository, those that an encoder or an exported model is read from.

    names -> folders of the network -> config.json, one weight set, the tokenizer

One choice for the listing of a hub and for a folder of its cache; nothing here knows where the names come from.
"""

import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from dit_jax.encoders import networks, places, weights
from dit_jax.encoders.tokenizer import FILES

Kind = places.Kind | Literal["model"]  # model: an exported one, with the encoders that lie in it
EXPORTED_ENCODERS = re.compile(r"(vae|text_encoder|tokenizer)/.+\.(json|txt|safetensors|msgpack)")
EXPORTED = ("model.safetensors", "transformer/diffusion_pytorch_model.safetensors")  # for dit_jax, and for diffusers
ORBAX_INDEX = "orbax/_METADATA"  # names all arrays of an Orbax checkpoint

Open = Callable[[str], Path]  # the local file of a name in the repository


class NotWhole(Exception):
    """A listing, of the hub or of the cache, lacks what the network needs; the text says what."""


def choose(names: set[str], open_file: Open, base: str, kind: Kind) -> list[str]:
    """Of all names of a repository, those that an encoder or exported model is read from, the small ones first.

    Args:
      names: relative to the repository's top.
      open_file: gives the local file of one of them; used for indices, which name further files.
      base: the folder that was asked for, "" for the top.
      kind: of the network.

    Raises:
      NotWhole: a needed file is not among them or damaged, or only pickles are there.
    """
    if kind == "model":
        return _export_files(names, base)
    small: list[str] = []
    large: list[str] = []
    for folder in _network_folders(names, open_file, base, kind):
        config = _join(folder, "config.json")
        if config not in names:
            known = sorted(str(PurePosixPath(name).parent) for name in names if name.endswith("/config.json"))
            raise NotWhole(f"there is no {config}" + (f"; there is one in {', '.join(known)}" if known else ""))
        small.append(config)
        if kind == "text_encoder":
            small += _tokenizer_files(names, folder)
        for name in _weight_set(names, open_file, folder):
            (small if name.endswith(".json") else large).append(name)
    return small + large


def _export_files(names: set[str], base: str) -> list[str]:
    """The files of an exported model; the encoders that it only names are fetched by their own ids.

    The one that shows that the parameters are there comes last: a fetch that was cut off lacks it.
    """
    below = {name.removeprefix(_join(base, "")) for name in names if name.startswith(_join(base, ""))}
    if "config.json" not in below:
        raise NotWhole(f"there is no {_join(base, 'config.json')}: it is no exported model")
    chosen = {name for name in below if EXPORTED_ENCODERS.fullmatch(name)}
    if found := [name for name in EXPORTED if name in below]:
        last = found[0]
    elif ORBAX_INDEX in below:
        last = ORBAX_INDEX
        chosen |= {name for name in below if name.startswith("orbax/")} - {last}
    else:
        here = base or "its top folder"
        raise NotWhole(f"there is neither model.safetensors nor orbax/ in {here}: it is no exported model")
    return [_join(base, name) for name in ("config.json", *sorted(chosen), last)]


def _network_folders(names: set[str], open_file: Open, base: str, kind: places.Kind) -> list[str]:
    """The folders of one encoder below ``base``, by the rule of `places.find`."""
    first = _join(base, kind)
    if not any(name.startswith(f"{first}/") for name in names):
        return [base]
    if kind == "vae":
        return [first]
    if _join(first, "config.json") not in names:
        return _network_folders(names, open_file, first, kind)
    others = {name for name in names if re.fullmatch(re.escape(first) + r"_\d/config\.json", name)}
    found = [first, *sorted(str(PurePosixPath(name).parent) for name in others)]
    index = _join(base, "model_index.json")
    if index not in names:
        return found
    # SD3's third text encoder is a T5 of many gigabytes, which nothing here reads.
    classes = weights.read_json(open_file(index))
    return [folder for folder in found if _class_of(classes, PurePosixPath(folder).name) in networks.TEXT_CLASSES]


def _class_of(model_index: dict[str, Any], component: str) -> str:
    """The class of a component of a pipeline, whose ``model_index.json`` has ``name: [library, class]``."""
    entry = model_index.get(component)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else ""


def _tokenizer_files(names: set[str], folder: str) -> list[str]:
    """The tokenizer's files of the text encoder in ``folder``, by the rule of `tokenizer.find_tokenizer`."""
    candidates = tokenizer_folders(folder)
    for candidate in candidates:
        found = [name for name in FILES if _join(candidate, name) in names]
        if "tokenizer.json" in found or {"vocab.json", "merges.txt"} <= {*found}:
            return [_join(candidate, name) for name in found]
    raise NotWhole(
        "there is no tokenizer (tokenizer.json, or vocab.json and merges.txt) in "
        + " or ".join(candidate or "its top folder" for candidate in candidates)
    )


def tokenizer_folders(folder: str) -> list[str]:
    """Where the tokenizer of the text encoder in ``folder`` may lie."""
    if not folder:
        return [folder]
    place = PurePosixPath(folder)
    sibling = place.name.replace("text_encoder", "tokenizer") if "text_encoder" in place.name else "tokenizer"
    return [folder, str(place.with_name(sibling))]


def _weight_set(names: set[str], open_file: Open, folder: str) -> list[str]:
    """One set of weights, by the rule of `weights.choose`."""
    here = {PurePosixPath(name).name for name in names if str(PurePosixPath(name).parent) == (folder or ".")}
    try:
        chosen = weights.choose(here, lambda name: open_file(_join(folder, name)), folder or "its top folder")
    except (FileNotFoundError, ValueError) as error:
        raise NotWhole(str(error)) from error
    return [_join(folder, name) for name in chosen]


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
