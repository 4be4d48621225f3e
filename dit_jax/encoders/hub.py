"""Encoders and exported models from a hub: ``owner/name[/subfolder][@revision]`` in, a folder of the local cache out.

    listing of the repository -> choose (one weight set, its config, its tokenizer) -> fetch -> check -> folder

`huggingface_hub` does the transfers and lays the cache out, so HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and
proxies mean what they always mean. A branch is written to ``refs/`` only when all of its files are there and right:
what was cut off in the middle is never taken for whole. The same `choose` (of `listing`) looks at a cached folder, so
files that another program has put there serve as well.
"""

import contextlib
import dataclasses
import email.utils
import errno
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from pathlib import Path, PureWindowsPath
from typing import TypeVar

import jax
import numpy as np
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id
from jax.experimental import multihost_utils

from dit_jax.encoders.listing import Kind, NotWhole, choose, tokenizer_folders
from dit_jax.encoders.places import HUB_ID
from dit_jax.encoders.tokenizer import FILES
from dit_jax.errors import FetchError

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before the second and later attempts, where the hub names none
LONGEST_WAIT = 300.0  # a hub that asks for more is treated as one that does not answer
HEARTBEAT = 5.0  # seconds; a collective that waits for half a minute is given up by some backends

# The bases of HfHubHTTPError are the HTTP library's own, which is another one in every major version of the hub's
# library. hf_xet, which carries large files, raises RuntimeError; what is no listing at all, such as the log-in page
# of a network, raises what NO_LISTING has.
NO_LISTING = (ValueError, KeyError, TypeError, AttributeError)
CALL_ERRORS = (OSError, EntryNotFoundError, RuntimeError, *NO_LISTING, *HfHubHTTPError.__bases__)
TEMPORARY_STATUS = (408, 429)  # and all from 500 on
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")

T = TypeVar("T")


class _NoAnswer(Exception):
    """The hub did not give what was asked for; the text says why. A cached snapshot may serve instead."""


@dataclasses.dataclass(frozen=True)
class HubId:
    """A place on the hub: ``owner/name``, a folder in it ("" is its top), a branch, tag or commit."""

    repo: str
    subfolder: str
    revision: str

    def __str__(self) -> str:
        place = f"{self.repo}/{self.subfolder}" if self.subfolder else self.repo
        return f"{place}@{self.revision}"


def parse(spec: str) -> HubId:
    """``owner/name[/subfolder][@revision]``; the revision is ``main`` where none is named.

    Raises:
      ValueError: the text has another form, or no repository can have this name.
    """
    place, at, revision = spec.partition("@")
    owner, _, rest = place.partition("/")
    name, _, subfolder = rest.partition("/")
    if not HUB_ID.fullmatch(spec) or (at and not all(part.strip(".") for part in revision.split("/"))):
        raise ValueError(f"{spec!r} is no hub id; the form is owner/name[/subfolder][@revision]")
    try:
        validate_repo_id(f"{owner}/{name}")
    except HFValidationError as error:
        raise ValueError(f"{spec!r} is no hub id: {error}") from error
    return HubId(f"{owner}/{name}", subfolder, revision or constants.DEFAULT_REVISION)


def fetch(spec: str, kind: Kind) -> Path:
    """The local folder of an encoder or exported model on the hub, fetched where it is not in the cache yet.

    One process fetches; the others wait, then take the same commit from a shared cache or fetch it themselves.

    Returns:
      The folder with ``config.json``, or the one with ``vae`` or ``text_encoder`` in it where the id names a
      whole pipeline; a text encoder's tokenizer lies in the same folder or beside it.

    Raises:
      FetchError: the files are neither there nor cached, are not what the hub says they are, or are only pickles.
      ValueError: ``spec`` is no hub id.
    """
    hub_id = parse(spec)
    root = (_fetch if jax.process_count() == 1 else _fetch_together)(hub_id, kind)
    return root / hub_id.subfolder


# ---------------------------------------------------------------------------------------------- cache and network


def _refuse_escapes(names: Iterable[str], hub_id: HubId) -> None:
    """A name that would lie outside of the repository's folder condemns the whole listing."""
    for name in names:
        if not name or PureWindowsPath(name).anchor or ".." in re.split(r"[/\\]", name):
            raise FetchError(f"{hub_id} lists the file {name!r}, which lies outside of its folder; nothing was fetched")


def _fetch(hub_id: HubId, kind: Kind) -> Path:
    """The snapshot's top folder, whose name is the commit, with all that the encoder needs."""
    cached = _cached(hub_id, kind)
    if cached and cached.name == hub_id.revision:
        _say(f"{hub_id} is cached in {cached}")
        return cached
    try:
        if constants.HF_HUB_OFFLINE:
            raise _NoAnswer("HF_HUB_OFFLINE is set")
        return _download(hub_id, kind)
    except _NoAnswer as reason:
        if cached:
            _say(f"{hub_id}: {reason}; using the cached commit {cached.name} in {cached}")
            return cached
        offline = "unset HF_HUB_OFFLINE, " if constants.HF_HUB_OFFLINE else ""
        raise FetchError(
            f"there is no folder {str(hub_id).partition('@')[0]} here, and the hub id {hub_id} cannot be"
            f" fetched from {constants.ENDPOINT} and is not cached whole in {constants.HF_HUB_CACHE}:"
            f" {reason}; {offline}set HF_ENDPOINT to a mirror, or give a folder with {_by_hand(hub_id, kind)}"
        ) from reason


def _by_hand(hub_id: HubId, kind: Kind) -> str:
    """The files that a person without a network copies into one folder, in the names that most repositories use."""

    def page(folder: str) -> str:
        return f"{constants.ENDPOINT}/{hub_id.repo}/tree/{hub_id.revision}/{folder}".rstrip("/")

    if kind == "model":
        return f"all files of {page(hub_id.subfolder)}"
    network = page(hub_id.subfolder) + ("" if hub_id.subfolder else " (of a pipeline: with its subfolders)")
    if kind == "vae":
        return f"config.json and diffusion_pytorch_model.safetensors of {network}"
    tokenizer = page(tokenizer_folders(hub_id.subfolder)[-1])
    return f"config.json and model.safetensors of {network} and what there is of {', '.join(FILES)} of {tokenizer}"


def _cached(hub_id: HubId, kind: Kind) -> Path | None:
    """The snapshot in the cache, if it is whole; a file whose hash is wrong is removed."""
    commit = hub_id.revision
    if not COMMIT.fullmatch(commit):
        ref = _storage(hub_id) / "refs" / commit
        commit = ref.read_text(errors="replace").strip() if ref.is_file() else ""
    root = _storage(hub_id) / "snapshots" / commit
    if not COMMIT.fullmatch(commit) or not root.is_dir():
        return None
    names = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    try:
        chosen = choose(names, root.joinpath, hub_id.subfolder, kind)
    except NotWhole:
        return None
    for name in chosen:
        _refuse_links_out(root / name)
        if not _is_intact(root / name, None):
            _say(f"{hub_id}: the cached {name} is damaged and was removed")
            return None
    return root


def _download(hub_id: HubId, kind: Kind) -> Path:
    """As ``_fetch``, from the hub.

    Raises:
      _NoAnswer: the hub does not answer, or does not give it to us.
      FetchError: what it gives is refused.
    """
    api, seconds = HfApi(), constants.HF_HUB_ETAG_TIMEOUT
    info = _call(
        str(hub_id),
        lambda: api.model_info(hub_id.repo, revision=hub_id.revision, files_metadata=True, timeout=seconds),
    )
    files = {file.rfilename: file for file in info.siblings or ()}
    _refuse_escapes(files, hub_id)
    if not COMMIT.fullmatch(info.sha or ""):
        raise FetchError(f"{constants.ENDPOINT} is no hub: it answers for {hub_id} with the commit {info.sha!r}")
    root = _storage(hub_id) / "snapshots" / info.sha

    def get(name: str) -> Path:
        lfs = files[name].lfs
        return _get(hub_id, root, name, lfs.sha256 if lfs else None)

    try:
        chosen = choose(set(files), get, hub_id.subfolder, kind)
    except NotWhole as reason:
        raise FetchError(f"{hub_id} cannot be used: {reason}") from reason
    absent = [name for name in chosen if not (root / name).is_file()]
    total = sum(files[name].size or 0 for name in absent)
    what = f"{hub_id}, commit {info.sha}, from {constants.ENDPOINT}"
    _say(f"fetching {what}: {', '.join(absent)}, {total / 2**20:.2f} MiB" if absent else f"{what}: cached")
    start = time.monotonic()
    for name in chosen:
        get(name)
    if absent:
        _say(f"fetched {hub_id} into {root} in {time.monotonic() - start:.1f} s")
    if hub_id.revision != info.sha:
        _write_ref(hub_id, info.sha)
    return root


def _write_ref(hub_id: HubId, commit: str) -> None:
    """Notes in the cache which commit a branch or tag stands for; nothing is written where that is known."""
    ref = _storage(hub_id) / "refs" / hub_id.revision
    if ref.is_file() and ref.read_text(errors="replace").strip() == commit:
        return
    with _writable_cache():
        ref.parent.mkdir(parents=True, exist_ok=True)
        temporary = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
        temporary.write_text(commit)
        temporary.replace(ref)


@contextlib.contextmanager
def _writable_cache() -> Iterator[None]:
    """A cache that this user may not write to ends the program with its name; a full disk keeps its own error."""
    try:
        yield
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        raise FetchError(
            f"cannot write to the cache {constants.HF_HUB_CACHE}: {error.strerror}; set HF_HOME to a folder of yours"
        ) from error


def _get(hub_id: HubId, root: Path, name: str, sha256: str | None) -> Path:
    """One file of the commit that ``root`` is named by, checked."""
    found = _call(f"{hub_id} {name}", lambda: hf_hub_download(hub_id.repo, name, revision=root.name))
    if not (root / name).is_file():
        raise FetchError(f"{hub_id}: {constants.ENDPOINT} answers for {name} with another commit: {found}")
    _refuse_links_out(root / name)
    if not _is_intact(root / name, sha256):
        raise FetchError(
            f"{hub_id}: {name} from {constants.ENDPOINT} has another sha256 than the hub states and was removed;"
            " try again, or set HF_ENDPOINT to another mirror"
        )
    return root / name


def _storage(hub_id: HubId) -> Path:
    """The repository's folder in the cache."""
    cache = Path(constants.HF_HUB_CACHE).expanduser()
    return cache / repo_folder_name(repo_id=hub_id.repo, repo_type=constants.REPO_TYPE_MODEL)


def _refuse_links_out(path: Path) -> None:
    """A link in a snapshot points to a blob; one that points out of the cache was not laid by the hub's library."""
    storage = path
    while storage.name != "snapshots":
        storage = storage.parent
    storage = storage.parent
    # Newer versions of the library share blobs between repositories, in another folder of the cache.
    if not any(path.resolve().is_relative_to(place.resolve()) for place in (storage, storage.parent)):
        raise FetchError(f"{path} is a link out of the cache, to {path.resolve()}; remove it")


def _is_intact(path: Path, sha256: str | None) -> bool:
    """Whether a file of a snapshot has the hash that the hub states for it; if not, it is gone.

    Large files lie in the cache under the hash that the hub stated when they came, so that those fetched long ago
    are checked as well. Small files have no such hash.
    """
    blob = path.parent / os.readlink(path) if path.is_symlink() else path
    stated = sha256 or (blob.name if SHA256.fullmatch(blob.name) else None)
    if stated is None:
        return True
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() == stated:
            return True
    for place in (path.resolve(), blob, path):
        place.unlink(missing_ok=True)
    return False


def _call(what: str, request: Callable[[], T]) -> T:
    """What ``request`` returns, asked again with growing pauses while the failure looks temporary.

    Raises:
      _NoAnswer: it did not help, or the hub's answer is final.
      FetchError: the cache cannot be written to.
      OSError: the disk is full.
    """
    for number, pause in enumerate((*WAITS, None), start=2):
        try:
            with _writable_cache():
                return request()
        except CALL_ERRORS as error:
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise
            cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
            reason, is_temporary = _judge(cause)
            if not is_temporary:
                raise _NoAnswer(reason) from error
            asked = _retry_after(cause)
            if pause is None or asked > LONGEST_WAIT:
                after = f"after {number - 1} attempts" if pause is None else f"it asks to come back in {asked:.0f} s"
                raise _NoAnswer(f"{reason} ({after})") from error
            pause = max(pause, asked)
            _say(f"{what}: {reason}; attempt {number} of {len(WAITS) + 1} in {pause:g} s")
            time.sleep(pause)
    raise AssertionError("unreachable")


def _judge(error: BaseException) -> tuple[str, bool]:
    """What a failed call means, and whether it may be better in a moment."""
    if isinstance(error, GatedRepoError):
        return "the repository is gated: accept its terms on its page, then set HF_TOKEN to your token", False
    if isinstance(error, RevisionNotFoundError):
        return "there is no such branch, tag or commit in the repository", False
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private: set HF_TOKEN to a token that may read it", False
    if isinstance(error, EntryNotFoundError):
        return "a file of the listing is not there", False
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the hub refuses access (HTTP {status}): set HF_TOKEN to a token that may read it", False
    if status is not None:
        return f"the hub answers HTTP {status}", status in TEMPORARY_STATUS or status >= 500
    said = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
    if isinstance(error, NO_LISTING):
        return f"what answers is no hub, perhaps a page of your network's ({said})", False
    return f"the hub does not answer ({said})", True


def _retry_after(error: BaseException) -> float:
    """The seconds that the hub asks to wait, 0 where it does not say: a number or a date."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    text = headers.get("Retry-After", "")
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def _say(line: str) -> None:
    print(f"hub: {line}", flush=True)


# ------------------------------------------------------------------------------------------------ many processes


def _fetch_together(hub_id: HubId, kind: Kind) -> Path:
    """As ``_fetch``, in all processes: the first fetches and tells the others the commit.

    While it fetches, the processes meet at every heartbeat, since no collective may wait for as long as a download.
    """
    pool = futures.ThreadPoolExecutor(1)
    first = pool.submit(_fetch, hub_id, kind) if jax.process_index() == 0 else None
    told = b""
    while not told:
        message = b""
        if first and futures.wait([first], HEARTBEAT).done:
            message = b"failed" if first.exception() else first.result().name.encode()
        row = np.frombuffer(message.ljust(40, b"\0"), np.uint8)
        told = np.asarray(multihost_utils.broadcast_one_to_all(row)).tobytes().rstrip(b"\0")
    pool.shutdown()
    if first:
        return first.result()
    if told == b"failed":
        raise FetchError(f"process 0 could not fetch {hub_id}; its own line says why")
    return _fetch(dataclasses.replace(hub_id, revision=told.decode()), kind)
