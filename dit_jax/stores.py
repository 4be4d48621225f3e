"""Folders on this machine and in buckets: ``gs://bucket/run``.

`folder_of` makes a path of either, with the methods of ``pathlib.Path`` (``etils.epath``, which Orbax uses too). A
bucket holds objects and no folders: what takes a request an object there, or more than one stroke, is a function here.
"""

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from dit_jax.errors import ConfigError, FetchError, UserError

SCHEME = "gs://"  # the only one that Orbax writes arrays to


def folder_of(text: str) -> Path:
    """A folder by the user's word: ``gs://bucket/folder``, or on this machine, where ``~`` is the home folder.

    Raises:
      ConfigError: another kind of address.
    """
    if not text.startswith(SCHEME):
        if "://" in text:
            raise ConfigError(
                f"{text} is neither {SCHEME}bucket/folder nor a folder here; mount it, and name the folder"
            )
        return Path(text).expanduser()
    import fsspec
    from etils import epath

    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False  # arrays are written past them
    return cast(Path, epath.Path(text))


def in_bucket(path: Path) -> bool:
    """Whether a path lies in a bucket."""
    return str(path).startswith(SCHEME)


def absolute(path: Path) -> Path:
    """The path from the root of the disk, or from the bucket."""
    return path if in_bucket(path) else path.absolute()


def reach(path: Path) -> None:
    """Look whether a bucket can be reached, before anything is done; a folder here always can.

    Raises:
      ConfigError: the library that speaks to it is missing.
      FetchError: the bucket is not there, or not for this user.
    """
    if in_bucket(path):
        with _reaching(path):
            _bucket().info(str(path).removeprefix(SCHEME).partition("/")[0])


def files_of(folder: Path) -> dict[str, int]:
    """The bytes of every file in a folder and below, by path from there; none if it is not there.

    In a bucket this is one request, whatever there is.
    """
    if not in_bucket(folder):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    with _reaching(folder):
        start = str(folder).removeprefix(SCHEME).rstrip("/") + "/"
        found = _bucket().find(start, detail=True)
    return {name.removeprefix(start): info["size"] for name, info in found.items() if not name.endswith("/")}


def remove(folder: Path) -> None:
    """Remove a folder with all that is in it, if it is there."""
    if in_bucket(folder):
        if files_of(folder):
            with _reaching(folder):
                _bucket().rm(str(folder), recursive=True)
    elif folder.exists():
        shutil.rmtree(folder)


def move(folder: Path, target: Path) -> None:
    """Rename a folder; in a bucket that is file by file, and a process that ends in between leaves some in each."""
    if not in_bucket(folder):
        folder.rename(target)
        return
    with _reaching(folder):
        for name in files_of(folder):
            _bucket().mv(f"{folder}/{name}", f"{target}/{name}")


def put(file: Path, target: Path) -> None:
    """Write a file of this machine whole into a bucket; there it is the old one or the new one."""
    with _reaching(target):
        target.write_bytes(file.read_bytes())


def get(path: Path, target: Path) -> None:
    """Fetch a file out of a bucket."""
    with _reaching(path):
        target.write_bytes(path.read_bytes())


@contextmanager
def _reaching(path: Path) -> Iterator[None]:
    """What goes wrong on the way to a bucket, in one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # every library on the way has errors of its own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise FetchError(
            f"cannot reach {path}: {reason}; is the bucket there, and are you logged in (gcloud auth"
            " application-default login)?"
        ) from error


def _bucket() -> Any:
    """The file system of buckets."""
    if importlib.util.find_spec("gcsfs") is None:
        raise ConfigError(f"{SCHEME} needs gcsfs: pip install 'dit_jax[gcs]'")
    import fsspec

    return fsspec.filesystem("gcs")
