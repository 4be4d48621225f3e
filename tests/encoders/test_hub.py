"""Encoders from a hub: one small hub on this machine, and all that can go wrong with it."""

import email.utils
import errno
import hashlib
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from dit_jax.config import FORMATS
from dit_jax.encoders import hub, listing, load_text_encoder, load_vae
from dit_jax.errors import FetchError
from tests.tiny_run import tiny_flags

GOLDEN = Path(__file__).parent / "golden"
WEIGHTS = "diffusion_pytorch_model.safetensors"
LARGE = (".safetensors", ".msgpack", ".bin")  # kept in LFS, whose hashes the hub states
FOREVER = 1000


class Hub:
    """Answers what `huggingface_hub` asks: the listing of a revision, and the head and the body of a file.

    Attributes:
      repos: name of a repository -> name of a file -> its bytes.
      stated: file name -> the sha256 that the hub states, where it is not the true one.
      asked: ``(method, path)`` of every request.
      faults: ``[pattern of "METHOD path", times, fault]``; a fault is a status, a status with headers, the seconds
        before the answer, or "cut" for a body that ends in the middle.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.branch = "main"
        self.stated: dict[str, str] = {}
        self.asked: list[str] = []
        self.faults: list[list[Any]] = []
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def commit(self, repo: str) -> str:
        content = b"".join(name.encode() + data for name, data in sorted(self.repos[repo].items()))
        return hashlib.sha1(content).hexdigest()

    def bodies(self) -> list[str]:
        """The names of the files whose bodies were asked for, in order."""
        return [line.split("/", 5)[5] for line in self.asked if re.match("GET /[^/]+/[^/]+/resolve/", line)]

    def break_(self, pattern: str, fault: Any, times: int = FOREVER) -> None:
        self.faults.append([pattern, times, fault])

    def fault(self, request: str) -> Any:
        for row in self.faults:
            if row[1] and re.search(row[0], request):
                row[1] -= 1
                return row[2]
        return None

    def listing(self, repo: str) -> bytes:
        siblings = []
        for name, data in self.repos[repo].items():
            row: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": "b" * 40}
            if name.endswith(LARGE):
                row["lfs"] = {"sha256": self.sha256(name, data), "size": len(data), "pointerSize": 130}
            siblings.append(row)
        return json.dumps({"id": repo, "modelId": repo, "sha": self.commit(repo), "siblings": siblings}).encode()

    def sha256(self, name: str, data: bytes) -> str:
        return self.stated.get(name, hashlib.sha256(data).hexdigest())

    def handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        served = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def answer(self, status: int, body: bytes, headers: dict[str, str], cut: bool = False) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), "Connection": "close", **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body[: len(body) // 2] if cut else body)

            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path)
                served.asked.append(f"{self.command} {path}")
                fault = served.fault(served.asked[-1])
                if isinstance(fault, float):
                    threading.Event().wait(fault)
                if isinstance(fault, int):
                    return self.answer(fault, b"", {})
                if isinstance(fault, tuple):
                    return self.answer(fault[0], b"", fault[1])
                if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
                    return self.list(*match.groups())
                if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                    return self.file(*match.groups(), cut=fault == "cut")
                return self.answer(404, b"", {})

            do_HEAD = do_GET

            def list(self, repo: str, revision: str) -> None:
                if repo not in served.repos:
                    return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
                if revision not in (served.branch, served.commit(repo)):
                    return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
                return self.answer(200, served.listing(repo), {"Content-Type": "application/json"})

            def file(self, repo: str, revision: str, name: str, cut: bool) -> None:
                data = served.repos[repo][name]
                large = name.endswith(LARGE)
                etag = served.sha256(name, data) if large else hashlib.sha1(data).hexdigest()
                headers = {"ETag": f'"{etag}"', "X-Repo-Commit": revision, "Accept-Ranges": "bytes"}
                if large:
                    headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
                start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
                if not start:
                    return self.answer(200, data, headers, cut)
                begin = int(start[1])
                headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
                return self.answer(206, data[begin:], headers, cut)

        return Handler


def files_of(folder: Path, under: str = "") -> dict[str, bytes]:
    return {f"{under}{path.name}": path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def served() -> Iterator[Hub]:
    """A hub with ``lab/vae``: the golden VAE among all that a published repository has beside it."""
    made = Hub()
    beside = {"README.md": b"#", "diffusion_pytorch_model.bin": b"pickle", "diffusion_flax_model.msgpack": b"flax"}
    made.repos["lab/vae"] = {**files_of(GOLDEN / "vae_sd3"), **beside}
    yield made
    made.close()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made, none of them waited for."""
    made: list[float] = []
    monkeypatch.setattr(time, "sleep", made.append)
    return made


@pytest.fixture
def online(
    served: Hub, pauses: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pytest.MonkeyPatch]:
    """The hub's library in this process asks the served hub and keeps its cache in ``tmp_path``."""
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    yield monkeypatch
    close_session()


def refusal(spec: str = "lab/vae", kind: Any = "vae") -> str:
    """The one line that a fetch ends with."""
    with pytest.raises(FetchError) as error:
        hub.fetch(spec, kind)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- ids


@pytest.mark.parametrize(
    "spec, expected",
    [
        ("lab/vae", ("lab/vae", "", "main")),
        ("lab/sd-1.5/vae", ("lab/sd-1.5", "vae", "main")),
        ("lab/x/a/b@refs/pr/1", ("lab/x", "a/b", "refs/pr/1")),
        ("lab/x@v1.0", ("lab/x", "", "v1.0")),
    ],
)
def test_the_parts_of_an_id(spec, expected):
    assert hub.parse(spec) == hub.HubId(*expected)


@pytest.mark.parametrize(
    "spec", ["vae", "/lab/vae", "./lab/vae", "lab/../vae", "lab/vae/..", "lab/vae@", "lab/vae@../x", "lab/vae@a//b"]
)
def test_what_is_no_id(spec):
    with pytest.raises(ValueError, match="no hub id"):
        hub.parse(spec)


@pytest.mark.parametrize("spec", ["own--er/name", "lab/a..b", "lab/name.git", "lab/name-/vae", f"lab/{'x' * 100}"])
def test_names_that_no_repository_can_have_are_refused_in_one_line(spec):
    with pytest.raises(ValueError, match=f"^'{re.escape(spec)}' is no hub id: ") as error:
        hub.fetch(spec, "vae")
    assert "\n" not in str(error.value)


# ---- what is fetched


def test_a_vae_of_the_hub_is_the_local_one(served, online, capsys):
    found, local = load_vae("lab/vae"), load_vae(GOLDEN / "vae_sd3")
    assert found.sha256 == local.sha256
    images = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32)
    np.testing.assert_array_equal(found.encode(images)[0], local.encode(images)[0])
    assert served.bodies() == ["config.json", WEIGHTS]  # neither pickles, nor the other framework, nor the page
    said = capsys.readouterr().out
    size = sum((GOLDEN / "vae_sd3" / name).stat().st_size for name in ("config.json", WEIGHTS))
    for part in (served.commit("lab/vae"), served.url, f"config.json, {WEIGHTS}, {size / 2**20:.2f} MiB", " s\n"):
        assert part in said


def test_a_text_encoder_of_the_hub_brings_its_own_tokenizer(served, online):
    golden = files_of(GOLDEN / "text_sdxl2")
    is_network = {name: name in ("config.json", "model.safetensors") for name in golden}
    served.repos["lab/sdxl"] = {
        "model_index.json": b"{}",
        "text_encoder/config.json": b"{}",
        "tokenizer/vocab.json": b"{}",
        **{f"{'text_encoder_2' if is_network[name] else 'tokenizer_2'}/{name}": golden[name] for name in golden},
    }
    found, local = load_text_encoder("lab/sdxl/text_encoder_2"), load_text_encoder(GOLDEN / "text_sdxl2")
    assert found.sha256 == local.sha256
    np.testing.assert_array_equal(found(["a cat"]).pooled, local(["a cat"]).pooled)
    assert {name.split("/")[0] for name in served.bodies()} == {"text_encoder_2", "tokenizer_2"}


def test_of_a_pipeline_the_named_kind_is_fetched_and_no_t5(served, online):
    clip = ["transformers", "CLIPTextModelWithProjection"]
    index = {"text_encoder": clip, "text_encoder_2": clip, "text_encoder_3": ["transformers", "T5EncoderModel"]}
    files = {"model_index.json": json.dumps(index).encode(), **files_of(GOLDEN / "vae_sd3", "vae/")}
    for i in ("", "_2", "_3"):
        names = (f"text_encoder{i}/config.json", f"text_encoder{i}/model.safetensors", f"tokenizer{i}/tokenizer.json")
        files |= {name: json.dumps(name).encode() for name in names}  # the cache keeps equal bytes once
    served.repos["lab/sd3"] = {**files, "transformer/config.json": b"{}"}
    root = hub.fetch("lab/sd3", "vae")
    assert root.name == served.commit("lab/sd3") and served.bodies() == ["vae/config.json", f"vae/{WEIGHTS}"]
    assert load_vae("lab/sd3").sha256 == load_vae(GOLDEN / "vae_sd3").sha256
    served.asked.clear()
    assert hub.fetch("lab/sd3", "text_encoder") == root
    folders = {"text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"}
    assert {str(Path(name).parent) for name in served.bodies()} == {".", *folders}


CONFIG = {"config.json"}


@pytest.mark.parametrize(
    "there, taken",
    [
        ({"model.fp16.safetensors", "model.safetensors", "flax_model.msgpack"}, {"model.safetensors"}),
        ({"model.fp16.safetensors", "flax_model.msgpack"}, {"model.fp16.safetensors"}),
        ({"flax_model.msgpack", "pytorch_model.bin"}, {"flax_model.msgpack"}),
        (
            {"model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"},
            {"model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"},
        ),
        ({"model.safetensors", "model.safetensors.index.json"}, {"model.safetensors"}),
    ],
)
def test_one_set_of_weights(tmp_path, there, taken):
    shards = {"weight_map": {str(i): f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(shards))
    assert set(listing.choose(CONFIG | there, tmp_path.joinpath, "", "vae")) == CONFIG | taken


def test_an_index_that_names_other_places_is_refused(served, online):
    index = {"weight_map": {"a": "../../../secret.safetensors"}}
    served.repos["lab/x"] = {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode()}
    assert "names shards that are not there" in refusal("lab/x")


def test_a_damaged_index_is_refused(served, online):
    served.repos["lab/x"] = {"config.json": b"{}", "model.safetensors.index.json": b"<html>"}
    assert re.search(r"lab/x@main cannot be used: .*model.safetensors.index.json is damaged", refusal("lab/x"))


def test_only_pickles_are_refused_with_the_way_to_convert(served, online):
    served.repos["lab/old"] = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    line = refusal("lab/old")
    assert "only pickled weights (pytorch_model.bin)" in line and "safetensors.torch.save_file" in line
    assert served.bodies() == []


def test_a_wrong_subfolder_is_told_the_right_ones(served, online):
    served.repos["lab/sd"] = {"model_index.json": b"{}", **files_of(GOLDEN / "vae_sd3", "vae/")}
    assert "no VAE/config.json; there is one in vae" in refusal("lab/sd/VAE")


@pytest.mark.parametrize(
    "name", ["../../stolen.json", "/etc/stolen.json", "vae\\..\\..\\stolen", "C:\\stolen", "a/../../b"]
)
def test_a_hostile_listing_is_refused_whole(served, online, tmp_path, name):
    served.repos["lab/vae"][name] = b"{}"
    assert f"{name!r}, which lies outside" in refusal()
    assert served.bodies() == [] and not list(tmp_path.rglob("*stolen*"))


def test_a_link_out_of_the_cache_is_refused(served, online, tmp_path):
    path = hub.fetch("lab/vae", "vae") / "config.json"
    (tmp_path / "elsewhere.json").write_text("{}")
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere.json")
    assert "link out of the cache" in refusal()
    online.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "link out of the cache" in refusal()


# ---- a hub in trouble


def test_a_hub_that_is_busy_is_asked_again_when_it_says(served, online, pauses, capsys):
    served.break_("GET /api", (429, {"Retry-After": "7"}), times=1)
    served.break_("GET /api", 503, times=1)
    hub.fetch("lab/vae", "vae")
    assert pauses == [7.0, hub.WAITS[1]]
    assert "HTTP 429; attempt 2 of 5 in 7 s" in capsys.readouterr().out


def test_a_hub_may_name_a_date(served, online, pauses):
    served.break_("GET /api", (429, {"Retry-After": email.utils.formatdate(time.time() + 60)}), times=1)
    hub.fetch("lab/vae", "vae")
    assert 55 < pauses[0] <= 60


def test_a_hub_that_stays_broken_is_given_up(served, online, pauses):
    served.break_("GET /api", 500)
    line = refusal()
    assert "HTTP 500 (after 5 attempts)" in line and pauses == list(hub.WAITS)
    assert "HF_ENDPOINT" in line and f"config.json and {WEIGHTS} of {served.url}/lab/vae/tree/main" in line
    line = refusal("lab/xl/text_encoder_2", "text_encoder")
    for part in (f"model.safetensors of {served.url}/lab/xl/tree/main/text_encoder_2", "xl/tree/main/tokenizer_2"):
        assert part in line


@pytest.mark.parametrize("offline", [False, True])
def test_a_mistyped_folder_is_told_that_there_is_none(served, online, offline):
    online.setattr(constants, "HF_HUB_OFFLINE", offline)
    for spec, folder in {"run/quickstart": "run/quickstart", "run/a/b@v1": "run/a/b"}.items():
        assert refusal(spec, "model").startswith(f"there is no folder {folder} here, and the hub id {folder}@")


def test_a_hub_that_asks_for_an_hour_is_given_up_at_once(served, online, pauses):
    served.break_("GET /api", (429, {"Retry-After": "3600"}))
    assert "asks to come back in 3600 s" in refusal() and pauses == []


def test_a_file_that_stays_broken_is_given_up(served, online, pauses):
    served.break_(f"HEAD .*{WEIGHTS}", 502)
    assert "HTTP 502 (after 5 attempts)" in refusal()


def test_slow_answers_are_waited_for_up_to_the_limit(served, online, pauses):
    online.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
    served.break_("GET /api", 0.1, times=1)
    hub.fetch("lab/vae", "vae")
    assert pauses == []
    served.break_("GET /api", 0.6, times=1)
    hub.fetch("lab/vae", "vae")
    assert pauses == [hub.WAITS[0]]


def test_a_body_that_breaks_off_is_completed(served, online):
    served.break_(f"GET .*resolve.*{WEIGHTS}", "cut", times=2)
    folder = hub.fetch("lab/vae", "vae")
    assert (folder / WEIGHTS).read_bytes() == served.repos["lab/vae"][WEIGHTS]
    assert served.bodies().count(WEIGHTS) == 3


def test_a_body_that_always_breaks_off_is_given_up(served, online, tmp_path):
    served.break_(f"GET .*resolve.*{WEIGHTS}", "cut")
    assert "(after 5 attempts)" in refusal()
    assert not list(tmp_path.rglob(f"*{WEIGHTS}"))


def test_wrong_bytes_are_refused_by_name_and_removed(served, online, tmp_path):
    served.stated[WEIGHTS] = "0" * 64
    line = refusal()
    assert WEIGHTS in line and "another sha256" in line
    assert not list(tmp_path.rglob(f"*{WEIGHTS}")) and not list(tmp_path.rglob("0" * 64))
    online.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "not cached whole" in refusal() and "not cached whole" in refusal(f"lab/vae@{served.commit('lab/vae')}")


@pytest.mark.parametrize(
    "fault, said",
    [
        ((404, {"X-Error-Code": "RepoNotFound"}), "no such repository"),
        ((403, {"X-Error-Code": "GatedRepo"}), "gated: accept its terms on its page, then set HF_TOKEN"),
        ((404, {"X-Error-Code": "RevisionNotFound"}), "no such branch, tag or commit"),
        (403, r"refuses access \(HTTP 403\)"),
        ((200, {}), "what answers is no hub"),
    ],
)
def test_a_final_answer_is_not_asked_for_again(served, online, pauses, fault, said):
    served.break_("GET /api", fault)
    assert re.search(said, refusal()) and pauses == []


def test_a_cache_that_cannot_be_written_to(served, online, pauses):
    def deny(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    online.setattr(hub, "hf_hub_download", deny)
    assert "cannot write to the cache" in (line := refusal()) and "set HF_HOME" in line and pauses == []


def test_a_full_disk_is_not_taken_for_a_network_error(served, online, pauses):
    def fill(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    online.setattr(hub, "hf_hub_download", fill)
    with pytest.raises(OSError, match="No space left"):  # `runtime` ends on these words with code 8
        hub.fetch("lab/vae", "vae")
    assert pauses == []


# ---- what is cached


def test_a_pinned_commit_that_is_cached_touches_no_network(served, online, capsys):
    spec = f"lab/vae@{served.commit('lab/vae')}"
    folder = hub.fetch(spec, "vae")
    served.asked.clear()
    assert hub.fetch(spec, "vae") == folder
    assert served.asked == [] and "is cached in" in capsys.readouterr().out


def test_a_branch_that_has_not_moved_is_fetched_once(served, online):
    folder = hub.fetch("lab/vae", "vae")
    served.asked.clear()
    assert hub.fetch("lab/vae", "vae") == folder and served.bodies() == []
    served.repos["lab/vae"]["config.json"] += b"\n"
    assert hub.fetch("lab/vae", "vae") != folder and "config.json" in served.bodies()


def test_a_hub_that_is_gone_leaves_the_cache_in_use_and_says_so(served, online, capsys):
    folder = hub.fetch("lab/vae", "vae")
    served.close()
    assert hub.fetch("lab/vae", "vae") == folder
    assert f"using the cached commit {folder.name}" in capsys.readouterr().out


def test_offline_the_cache_is_used_without_an_attempt(served, online, capsys):
    folder = hub.fetch("lab/vae", "vae")
    served.asked.clear()
    online.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.fetch("lab/vae", "vae") == folder and served.asked == []
    assert f"HF_HUB_OFFLINE is set; using the cached commit {folder.name}" in capsys.readouterr().out
    (folder / WEIGHTS).unlink()
    assert "unset HF_HUB_OFFLINE" in refusal() and served.asked == []


def test_a_fetch_that_was_cut_off_is_not_taken_for_whole(served, online):
    old = hub.fetch("lab/vae", "vae")
    served.repos["lab/vae"]["config.json"] += b"\n"
    served.repos["lab/vae"][WEIGHTS] += b"\0"
    served.break_(f"HEAD .*{WEIGHTS}", 500)
    assert hub.fetch("lab/vae", "vae") == old  # said, as above
    new = old.with_name(served.commit("lab/vae"))
    assert (new / "config.json").is_file()
    online.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.fetch("lab/vae", "vae") == old
    assert "not cached whole" in refusal(f"lab/vae@{new.name}")


def test_a_cached_file_that_was_damaged_is_fetched_again(served, online, capsys):
    spec = f"lab/vae@{served.commit('lab/vae')}"
    path = hub.fetch(spec, "vae") / WEIGHTS
    path.resolve().write_bytes(b"rot")
    hub.fetch(spec, "vae")
    assert path.read_bytes() == served.repos["lab/vae"][WEIGHTS]
    assert f"the cached {WEIGHTS} is damaged and was removed" in capsys.readouterr().out


# ---- programs


def environment(served: Hub, home: Path, **more: str) -> dict[str, str]:
    hub_settings = {"HF_ENDPOINT": served.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "XLA_FLAGS": ""}
    return {**os.environ, **hub_settings, **more}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_an_exported_model_of_the_hub_draws_what_its_folder_draws(tiny_run, served, online, tmp_path, form):
    from dit_jax.exchange.components import PARAMETERS
    from dit_jax.export import export
    from dit_jax.sample import Pipeline

    pipe = Pipeline.load(tiny_run)
    export(pipe, tmp_path / "export", form, "float32", copy_encoders=False)
    paths = [path for path in (tmp_path / "export").rglob("*") if path.is_file()]
    files = {path.relative_to(tmp_path / "export").as_posix(): path for path in paths}
    beside = {"README.md": b"a page", "optimizer.bin": b"pickle", "vae/other.bin": b"pickle"}
    served.repos["lab/model"] = {name: path.read_bytes() for name, path in files.items()} | beside
    again = Pipeline.load("lab/model")
    read = ("config.json", "model.safetensors", "orbax/", "vae/", "text_encoder/", "tokenizer/", PARAMETERS)
    assert sorted(served.bodies()) == sorted(name for name in files if name.startswith(read))
    assert again.trained == pipe.trained
    np.testing.assert_array_equal(again.draw(["a red circle"], [0]), pipe.draw(["a red circle"], [0]))
    assert "there is neither model.safetensors nor orbax/ in its top folder" in refusal("lab/vae", "model")


@pytest.mark.parametrize("last", ["model.safetensors", listing.ORBAX_INDEX])
def test_an_exported_model_that_came_in_half_is_not_whole(served, online, last):
    """Every attempt breaks off at one file more, and a pinned commit that is whole would not be asked for again."""
    names = ("config.json", "vae/config.json", "vae/model.safetensors", "orbax/d/0", "orbax/manifest.ocdbt", last)
    served.repos["lab/model"] = {name: name.encode() for name in names}
    spec = f"lab/model@{served.commit('lab/model')}"
    needed = [name for name in names if not name.startswith("orbax/") or "orbax" in last]
    for name in needed:
        served.break_(f"HEAD .*/resolve/[^/]+/{name}$", 404, times=1)
    for _ in needed:
        assert "not cached whole" in refusal(spec, "model")
    root = hub.fetch(spec, "model")
    assert sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()) == sorted(needed)


def test_a_program_ends_in_one_line_with_code_7(served, tmp_path):
    flags = tiny_flags(tmp_path / "run", vae="lab/vae")
    command = [sys.executable, "-m", "dit_jax.main", *flags]
    env = environment(served, tmp_path / "home", HF_HUB_OFFLINE="1")
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    (line,) = done.stderr.splitlines()
    for part in ("fetch error: ", "lab/vae", served.url, str(tmp_path / "home"), "unset HF_HUB_OFFLINE", "HF_ENDPOINT"):
        assert part in line
    assert line.endswith("--config.vae=embedded --config.text_encoder=embedded") and served.asked == []


TOGETHER = """
import sys, time
import jax
from dit_jax.encoders import hub

hub.HEARTBEAT = 0.5
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from dit_jax.errors import FetchError
try:
    hub.fetch("lab/gone", "vae")
except FetchError as error:
    print("refused:", error)
print("found:", hub.fetch("lab/vae", "vae"))
"""


def test_of_two_processes_one_fetches(served, tmp_path):
    served.break_("GET /api/models/lab/vae", 1.2, times=1)  # longer than a heartbeat
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = environment(served, tmp_path / "home")
    processes = [
        subprocess.Popen([sys.executable, "-c", TOGETHER, address, str(i)], env=env, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    first, second = (process.communicate(timeout=100)[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert "no such repository" in first and "process 0 could not fetch lab/gone@main" in second
    assert re.findall("found: .*", first) == re.findall("found: .*", second) != []
    assert served.bodies() == ["config.json", WEIGHTS]
    assert sum("/api/models/lab/vae" in line for line in served.asked) == 1
