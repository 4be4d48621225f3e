"""From the user's word for an encoder to the folders that its files lie in.

embedded                              the small networks that ship with the package
a folder in the published layout      config.json, weights and, for text, the tokenizer
a pipeline or an exported run         the subfolders vae, text_encoder, text_encoder_2
a run                                 the encoders that its config.json names
owner/name[/subfolder][@revision]     any of these on the hub, where no such folder is at hand
"""

import re
from pathlib import Path
from typing import Literal

from dit_jax.encoders import weights

Kind = Literal["vae", "text_encoder"]

EMBEDDED = "embedded"
ASSETS = Path(__file__).parent.parent / "assets"
EMBEDDED_FOLDERS: dict[Kind, Path] = {"vae": ASSETS / "tiny_vae", "text_encoder": ASSETS / "tiny_clip"}

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)+(@[\w./-]+)?", re.ASCII)
OWN_FOLDERS = ("runs", "exports")  # where programs write unless told otherwise: no owners on a hub


def find(path: str | Path, kind: Kind) -> list[Path]:
    """The folders of one encoder, each with a ``config.json``: one, or two for SDXL's joined text towers.

    Raises:
      FileNotFoundError: there is no such folder, or it holds no such encoder.
      ValueError: as of ``follow_runs``.
    """
    return folders_of(_local(follow_runs(path, kind), kind), kind)


def follow_runs(path: str | Path, kind: Kind) -> str:
    """The name of the encoder itself, where ``path`` is a run that only names it; nothing is fetched.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: a ``config.json`` on the way is damaged, or runs name each other in a circle.
    """
    names = [str(path)]
    while not is_hub_id(names[-1]) and (named := _named_by_run(_local(names[-1], kind), kind)):
        if named in names:
            raise ValueError(f"{path} names as its {kind} a run that names it again: {' -> '.join([*names, named])}")
        names.append(named)
    return names[-1]


def folders_of(root: Path, kind: Kind) -> list[Path]:
    """The subfolders of a pipeline or an exported run, else the folder itself.

    Raises:
      FileNotFoundError: one has no ``config.json``.
    """
    if not (root / kind).is_dir():
        if not (root / "config.json").is_file():
            raise FileNotFoundError(f"no config.json in {root}, and no {kind}/config.json")
        return [root]
    if kind == "text_encoder" and not (root / kind / "config.json").is_file():
        return folders_of(root / kind, kind)  # an exported run whose text encoder is a joined one
    found = [root / kind]
    if kind == "text_encoder":
        found += sorted(folder for folder in root.glob("text_encoder_[0-9]") if folder.is_dir())
    for folder in found:
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"no config.json in {folder}")
    return found


def is_hub_id(path: str | Path) -> bool:
    """Whether a name has the form of a hub id, and its first part is neither a folder here nor one of our own."""
    owner = str(path).partition("/")[0]
    return bool(HUB_ID.fullmatch(str(path))) and owner not in OWN_FOLDERS and not Path(owner).is_dir()


def hidden_by(path: str | Path) -> str:
    """Words for the end of an error, where a folder here keeps a name from being a hub id; else none."""
    owner = str(path).partition("/")[0]
    if not HUB_ID.fullmatch(str(path)) or owner in OWN_FOLDERS or not Path(owner).is_dir():
        return ""
    return f"; a folder {owner!r} lies here, so it is not looked for on the hub"


def _local(path: str | Path, kind: Kind) -> Path:
    """The folder that a name stands for, fetched where it is a hub id."""
    if str(path) == EMBEDDED:
        return EMBEDDED_FOLDERS[kind]
    if is_hub_id(path):
        from dit_jax.encoders import hub  # its library takes a second to import, and few names need it

        return hub.fetch(str(path), kind)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{str(path)!r} is neither {EMBEDDED!r} nor a local folder (looked for {folder.absolute()})"
            + hidden_by(path)
        )
    return folder


def _named_by_run(root: Path, kind: Kind) -> str | None:
    """What a run's own config names as its encoder; None where ``root`` holds the encoder itself."""
    config = root / "config.json"
    if (root / kind).is_dir() or not config.is_file():
        return None
    keys = weights.read_json(config)
    is_run = all(isinstance(keys.get(key), str) for key in ("vae", "text_encoder"))
    return keys[kind] if is_run else None
