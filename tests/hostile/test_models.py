"""Whatever lies in the folder of an encoder, an export or a run: it is what it says it is, or one line says why not."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dit_jax import config as configs
from dit_jax.config import apply_overrides, load_config, read_json
from dit_jax.encoders import hub, networks, weights
from dit_jax.encoders.listing import NotWhole, choose
from dit_jax.encoders.tokenizer import Tokenizer
from dit_jax.errors import CheckpointError, ConfigError, FetchError
from dit_jax.files import flatten
from dit_jax.sample import read_prompts
from dit_jax.training import manifest
from dit_jax.training.saved_steps import restore_metadata
from dit_jax.training.writer import truncate_rows
from tests.encoders.test_tokenizer import GOLDEN
from tests.hostile.mutations import JSON, TEXT, changed, mutated
from tests.tiny_run import CONFIG

pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")  # of long examples

SLOW = settings(max_examples=max(settings.default.max_examples // 8, 5))


def in_one_line(error, file):
    """The error names the file that is wrong, in a line."""
    assert str(file) in str(error) and "\n" not in str(error), str(error)


# --- encoders -----------------------------------------------------------------------------------------------

ENCODERS = {path.parent.name: json.loads(path.read_text()) for path in sorted(GOLDEN.glob("*/config.json"))}
of_encoders = st.sampled_from(list(ENCODERS.values())).flatmap(changed) | JSON.map(
    lambda value: json.dumps(value).encode()
)
of_encoders |= st.sampled_from(list(ENCODERS.values())).flatmap(lambda one: mutated(json.dumps(one).encode()))


@given(content=of_encoders)
def test_configs_of_encoders(content, tmp_path, soon):
    (tmp_path / "config.json").write_bytes(content)
    for read in (networks.open_vae, lambda folder, dtype: networks.open_text([folder], None, None, dtype)):
        with soon():
            try:
                read(tmp_path, np.dtype("float32"))
            except ValueError as error:
                in_one_line(error, tmp_path / "config.json")


def safetensors_of(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + bytes(64)


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]},
    "b": {"dtype": "BF16", "shape": [16], "data_offsets": [32, 64]},
}


def read_or_refused(file: Path, content: bytes, soon, most: int) -> None:
    """What is read of a file of weights has no more bytes than ``most``, or it is refused in one line."""
    file.write_bytes(content)
    with soon():
        try:
            found = weights.read_tensors([file])
        except ValueError as error:
            in_one_line(error, file.name)
            return
    assert sum(array.nbytes for array in found.values()) <= most


@given(content=mutated(safetensors_of(json.dumps(HEADER).encode())) | changed(HEADER).map(safetensors_of))
def test_safetensors(content, tmp_path, soon):
    read_or_refused(tmp_path / "model.safetensors", content, soon, len(content))


@given(content=mutated((GOLDEN / "flax_text" / "flax_model.msgpack").read_bytes()))
def test_msgpack(content, tmp_path, soon):
    read_or_refused(tmp_path / "flax_model.msgpack", content, soon, 2 * len(content))


INDEX = {
    "metadata": {"total_size": 64},
    "weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"},
}


@given(content=mutated(json.dumps(INDEX).encode()) | changed(INDEX))
def test_an_index_of_shards(content, tmp_path, soon):
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(content)
    for i in (1, 2):
        (tmp_path / f"model-{i}-of-2.safetensors").touch()
    with soon():
        try:
            files = weights.weight_files(tmp_path)
        except (ValueError, FileNotFoundError) as error:
            in_one_line(error, index.name)
            return
    assert all(file.parent == tmp_path and file.is_file() for file in files)


@SLOW
@given(data=st.data())
def test_tokenizers(data, tmp_path, soon):
    folder = tmp_path / "tokenizer"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(GOLDEN / "text_sd1", folder)
    file = folder / data.draw(st.sampled_from(["vocab.json", "merges.txt", "tokenizer_config.json"]))
    how = mutated(file.read_bytes())
    if file.suffix == ".json":
        how |= changed(json.loads(file.read_text()))
    file.write_bytes(data.draw(how))
    with soon():
        try:
            tokenizer = Tokenizer(folder, 16)
        except ValueError as error:
            in_one_line(error, folder)
            return
        ids, mask = tokenizer(["a cat", "", "?\0 \u4e00"])
    assert ids.shape == mask.shape == (3, 16) and 0 <= ids.min() <= ids.max() < tokenizer.vocab_size


NAMES = ["config.json", "vocab.json", "merges.txt", "model.safetensors", "model.bin", "model.safetensors.index.json",
         "orbax/_METADATA", "text_encoder/config.json", "vae/config.json", "vae/x.safetensors"]  # fmt: skip
a_name = (
    st.sampled_from(NAMES) | TEXT | st.sampled_from(["../x", "/x", "a/../../x", "C:\\x", "a\\..\\x", "~/x", "vae/.."])
)


@given(names=st.lists(a_name, max_size=6), kind=st.sampled_from(["vae", "text_encoder", "model"]))
def test_listings_of_a_hub(names, kind, tmp_path):
    """What is fetched lies below the folder that is meant for it."""
    try:
        hub._refuse_escapes(names, hub.parse("owner/name"))
        chosen = choose(set(names), lambda name: tmp_path / "nothing.json", "", kind)
    except (FetchError, NotWhole, FileNotFoundError):
        return
    assert chosen and all((tmp_path / name).resolve().is_relative_to(tmp_path.resolve()) for name in chosen)


# --- configs and runs ---------------------------------------------------------------------------------------

RUN = load_config(str(CONFIG), {}).to_dict()


@given(content=mutated(json.dumps(RUN).encode()) | changed(RUN) | JSON.map(lambda value: json.dumps(value).encode()))
def test_configs_of_runs(content, tmp_path, soon):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with soon():
        try:
            found = flatten(read_json(path))
        except ConfigError as error:
            in_one_line(error, path)
            return
    assert found.keys() == configs.KINDS.keys()
    assert all(isinstance(value, (configs.KINDS[key], int)) for key, value in found.items())


@given(
    key=st.sampled_from(sorted(configs.KINDS)) | TEXT,
    text=TEXT | JSON.map(str) | st.sampled_from(["(" * 5000, "[" * 999]),
)
def test_overrides(key, text):
    config = load_config(str(CONFIG), {})
    try:
        apply_overrides(config, {key: text})
    except ConfigError:
        return
    value = flatten(config)[key]
    assert type(value) is configs.KINDS[key]
    assert configs.KINDS[key] is not tuple or all(
        type(one) is (str if key in configs.WORDS else float) for one in value
    )


ROWS = "".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in range(1, 9)).encode()


@given(content=mutated(ROWS) | st.lists(JSON, max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()))
def test_rows_of_a_run(content, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    truncate_rows(path, 5)
    lines = path.read_bytes().split(b"\n")[:-1]
    assert all(json.loads(line)["step"] <= 5 for line in lines)
    assert set(ROWS.splitlines()[:5]) & set(content.split(b"\n")) <= set(lines)


@given(data=st.data())
def test_manifests_of_checkpoints(data, tmp_path, soon):
    folder = tmp_path / "step"
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("params/a", "ema/b", "metadata/c"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(name.encode())
    manifest.write(folder, ("params", "ema", "metadata"))
    whole = (folder / manifest.NAME).read_bytes()
    content = data.draw(mutated(whole))
    assume(content != whole)
    (folder / manifest.NAME).write_bytes(content)
    with soon():
        verdict = manifest.verify(folder, "full", ("params", "ema", "metadata"))
    assert verdict.problems and "\n" not in verdict.problems[0]


METADATA = {
    "data": "a" * 64,
    "vae": "b" * 64,
    "text_encoder": "c" * 64,
    "format": 1,
    "step": 3,
    "versions": {"dit_jax": "1"},
}


@SLOW
@given(
    content=mutated(json.dumps(METADATA).encode())
    | changed(METADATA)
    | JSON.map(lambda value: json.dumps(value).encode())
)
def test_metadata_of_checkpoints(content, tmp_path, soon):
    folder = tmp_path / "3" / "metadata"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata").write_bytes(content)
    with soon():
        try:
            assert isinstance(restore_metadata(tmp_path, 3), dict)
        except CheckpointError as error:
            in_one_line(error, folder.parent)


@given(content=mutated(b'{"prompt": "a cat", "seed": 3}\n{"prompt": "a dog"}\n') | st.binary(max_size=60))
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_prompts(suffix, content, tmp_path):
    path = tmp_path / f"prompts.{suffix}"
    path.write_bytes(content)
    try:
        assert all(isinstance(wish.prompt, str) for wish in read_prompts(path))
    except ConfigError as error:
        in_one_line(error, path)
