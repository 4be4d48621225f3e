"""SDXL's two text towers, read as one encoder."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dit_jax.encoders import TextEncoder, load_text_encoder
from tools import make_golden_encoders as golden

GOLDEN = Path(__file__).parent / "golden"
PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(GOLDEN / golden.JOINED, tmp_path / "pipeline"))


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def relative_error(found: jax.Array, expected: np.ndarray) -> float:
    """The largest difference, in units of the largest expected value."""
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


def check(folder: Path, expected: dict[str, np.ndarray]) -> None:
    """Compares the states of real tokens, side by side, and the pooled states of the second tower."""
    ids, mask = expected["ids"], expected["mask"]
    text = load_text_encoder(folder)
    states = text.encode_ids(ids, mask)
    assert relative_error(states.hidden[mask], expected["hidden"][mask]) < 1e-4
    assert relative_error(states.pooled, expected["pooled"]) < 1e-4
    assert not np.asarray(states.hidden)[~mask].any()
    assert (text.length, text.width, text.pooled_width) == (*states.hidden.shape[1:], states.pooled.shape[1])


def test_golden_values():
    check(GOLDEN / golden.JOINED, load_file(GOLDEN / f"{golden.JOINED}.expected.safetensors"))


def test_the_torch_classes_agree(tmp_path: Path):
    pytest.importorskip("torch")
    check(tmp_path, golden.build_joined(tmp_path))


def towers(**changes) -> list[TextEncoder]:
    """Each tower alone."""
    return [load_text_encoder(GOLDEN / golden.JOINED / part, **changes) for part in golden.JOINED_TOWERS]


def test_captions_in_states_out():
    captions = ["b cd", ""]
    states = load_text_encoder(GOLDEN / golden.JOINED)(captions)
    first, second = (tower(captions) for tower in towers(skip_layers=1, final_norm=False))
    np.testing.assert_allclose(states.hidden, np.concatenate([first.hidden, second.hidden], axis=-1), atol=1e-5)
    np.testing.assert_allclose(states.pooled, second.pooled, atol=1e-5)


def test_the_padding_token_of_the_second_tower_may_be_part_of_a_caption():
    """Its own tokenizer, as published, would read the word as padding."""
    first, second = towers()
    ids, _ = load_text_encoder(GOLDEN / golden.JOINED).tokenize(["a cat"])
    np.testing.assert_array_equal(ids, first.tokenize(["a cat"])[0])
    assert (ids != second.tokenize(["a cat"])[0]).any()


def test_layers_and_norm_can_be_asked_for():
    states = load_text_encoder(GOLDEN / golden.JOINED, skip_layers=0, final_norm=True)(["b cd"])
    first, second = (tower(["b cd"]) for tower in towers())
    np.testing.assert_allclose(states.hidden, np.concatenate([first.hidden, second.hidden], axis=-1), atol=1e-5)


def test_bfloat16_is_near_and_returns_float32():
    exact = load_text_encoder(GOLDEN / golden.JOINED)(["a cat"])
    half = load_text_encoder(GOLDEN / golden.JOINED, jnp.bfloat16)(["a cat"])
    assert half.hidden.dtype == half.pooled.dtype == jnp.float32
    assert 1e-4 < relative_error(half.hidden, np.asarray(exact.hidden)) < 0.05


def test_a_copy_is_the_same_encoder(tmp_path: Path):
    original = load_text_encoder(GOLDEN / golden.JOINED)
    original.copy_to(tmp_path / "export" / "text_encoder")
    copy = load_text_encoder(tmp_path / "export")
    assert copy.sha256 == original.sha256
    jax.tree.map(np.testing.assert_array_equal, copy.params, original.params)


@pytest.mark.parametrize(
    "name", [*(f"{part}/config.json" for part in PARTS[:2]), *(f"{p}/vocab.json" for p in PARTS[2:])]
)
def test_the_hash_covers_both_towers(pipeline: Path, name: str):
    before = load_text_encoder(pipeline).sha256
    (pipeline / name).write_text((pipeline / name).read_text() + "\n")
    assert load_text_encoder(pipeline).sha256 != before


def test_one_error_lists_what_is_wrong_with_both(pipeline: Path):
    for part in PARTS[:2]:
        path = pipeline / part / "model.safetensors"
        tensors = load_file(path)
        del tensors["text_model.final_layer_norm.bias"]
        save_file(tensors, path)
    with pytest.raises(ValueError) as error:
        load_text_encoder(pipeline)
    assert str(error.value).splitlines() == [
        f"{pipeline / 'text_encoder'}: the weights do not fit the config:",
        "  missing text_model.final_layer_norm.bias (16,)",
        f"{pipeline / 'text_encoder_2'}: the weights do not fit the config:",
        "  missing text_model.final_layer_norm.bias (24,)",
    ]


def test_a_t5_is_refused_by_name(pipeline: Path):
    (pipeline / "text_encoder_3").mkdir()
    (pipeline / "text_encoder_3" / "config.json").write_text('{"architectures": ["T5EncoderModel"]}')
    with pytest.raises(ValueError) as error:
        load_text_encoder(pipeline)
    assert str(error.value) == (
        f"{pipeline / 'text_encoder_3'} holds no CLIP but a T5EncoderModel, which is not read; name a tower "
        f"alone instead: {pipeline / 'text_encoder'} or {pipeline / 'text_encoder_2'}"
    )


def test_towers_of_different_lengths_are_refused(pipeline: Path):
    change_config(pipeline / "text_encoder_2", max_position_embeddings=13)
    with pytest.raises(ValueError, match="different lengths cannot be joined: .*text_encoder 12, .*text_encoder_2 13"):
        load_text_encoder(pipeline)


@pytest.mark.parametrize("name, old, new", [("vocab.json", '"b": 1,', '"B": 1,'), ("merges.txt", "ca t</w>\n", "")])
def test_tokenizers_that_differ_are_refused(pipeline: Path, name: str, old: str, new: str):
    path = pipeline / "tokenizer_2" / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match="tokenizers in .*tokenizer and .*tokenizer_2 differ; one must serve"):
        load_text_encoder(pipeline)
