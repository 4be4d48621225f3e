"""Captions become the ids that CLIP was trained with, and nothing is cut in silence."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dit_jax.encoders.tokenizer import Tokenizer, find_tokenizer
from tools import make_golden_encoders as golden

GOLDEN = Path(__file__).parent / "golden"
FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The tiny vocabulary: letters, and "cat"."""
    return Tokenizer(GOLDEN / "text_sd1", golden.TEXT_LENGTH)


def test_the_real_vocabulary_gives_the_recorded_ids(shared_data: Path):
    recorded = json.loads((GOLDEN / "clip_prompts.json").read_text(encoding="utf-8"))
    clip = Tokenizer(shared_data / "clip_tokenizer", 77)
    assert clip.vocab_size == 49408
    ids, mask = clip([row["prompt"] for row in recorded["rows"]])
    assert ids.shape == (len(recorded["rows"]), 77) and ids.dtype == np.int32
    for row, found, real in zip(recorded["rows"], ids, mask, strict=True):
        assert found[real].tolist() == row["ids"], (row["prompt"], recorded["origin"])
        assert (found[~real] == 49407).all()
    assert ids[0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_the_mask_is_true_from_begin_to_end(tokenizer: Tokenizer):
    ids, mask = tokenizer(["", "a cat"])
    words = {word: i for i, word in enumerate(golden.WORDS)}
    assert ids[0, :2].tolist() == [golden.BOS, golden.EOS]
    assert ids[1, :4].tolist() == [golden.BOS, words["a</w>"], words["cat</w>"], golden.EOS]
    np.testing.assert_array_equal(mask, np.arange(golden.TEXT_LENGTH)[None] < np.array([2, 4])[:, None])
    assert tokenizer([])[0].shape == (0, golden.TEXT_LENGTH)


def test_a_caption_that_just_fits_is_not_cut(tokenizer: Tokenizer):
    ids, mask = tokenizer(["a " * 10])
    assert mask.all() and ids[0, -1] == golden.EOS


def test_a_long_caption_is_cut_with_the_lost_words_shown(tokenizer: Tokenizer):
    lost = r"1 of 2 captions are longer than 12 tokens: one has 15, cut off: 'xyz b c'"
    with pytest.warns(UserWarning, match=lost):
        ids, mask = tokenizer(["a " * 8 + "xyz b\nc", "a"])  # the cut falls inside of xyz
    assert mask[0].all() and ids[0, -1] == golden.EOS and mask[1].sum() == 3


def test_many_long_captions_are_one_warning(tokenizer: Tokenizer):
    with pytest.warns(UserWarning, match="5 of 5 captions .* and 2 more") as caught:
        tokenizer(["b " * 400] * 5)
    assert len(caught) == 1 and len(str(caught[0].message)) < 1000


def test_a_long_caption_can_be_an_error(tokenizer: Tokenizer):
    with pytest.raises(ValueError, match="1 of 1 captions .* cut off: 'b b b'"):
        tokenizer(["a " * 10 + "b b b"], "error")
    with pytest.raises(ValueError, match="long_prompt='cut'; valid: truncate, error, chunk"):
        tokenizer(["a"], "cut")  # type: ignore[arg-type]


def test_a_long_caption_can_be_read_in_pieces(tokenizer: Tokenizer):
    S, words = golden.TEXT_LENGTH, {word: i for i, word in enumerate(golden.WORDS)}
    a, b = words["a</w>"], words["b</w>"]
    with pytest.warns(UserWarning, match="1 of 3 captions are longer than 12 tokens: read in pieces, up to 3"):
        ids, mask = tokenizer(["a " * 20 + "b", "", "b b"], "chunk")
    assert ids.shape == mask.shape == (3, 3 * S)
    begin, end = golden.BOS, golden.EOS
    assert ids[0][mask[0]].tolist() == [begin, *[a] * 10, end, begin, *[a] * 10, end, begin, b, end]
    np.testing.assert_array_equal(mask[0], np.arange(3 * S) < 2 * S + 3)
    for row, text in ((1, ""), (2, "b b")):
        alone, real = tokenizer([text])
        np.testing.assert_array_equal(ids[row, :S], alone[0])
        np.testing.assert_array_equal(mask[row, :S], real[0])
        assert not mask[row, S:].any()


def test_captions_that_fit_are_one_piece(tokenizer: Tokenizer):
    for found, expected in zip(tokenizer(["a " * 10, ""], "chunk"), tokenizer(["a " * 10, ""]), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert tokenizer([], "chunk")[0].shape == (0, golden.TEXT_LENGTH)


def test_one_string_is_not_a_list_of_captions(tokenizer: Tokenizer):
    with pytest.raises(ValueError, match="a list of captions, got the single string 'a cat'"):
        tokenizer("a cat")


def test_the_padding_token_is_the_configs(tmp_path: Path):
    shutil.copytree(GOLDEN / "text_sd1", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "z"}))
    ids, mask = Tokenizer(tmp_path, 6)(["cat"])
    assert ids[0, 3:].tolist() == [25, 25, 25] and not mask[0, 3:].any()


def test_tokenizer_json_alone_is_enough(tokenizer: Tokenizer, tmp_path: Path):
    from transformers import CLIPTokenizerFast

    CLIPTokenizerFast.from_pretrained(GOLDEN / "text_sd1").save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink(missing_ok=True)
    assert find_tokenizer(tmp_path) == tmp_path
    again = Tokenizer(tmp_path, golden.TEXT_LENGTH)
    for found, expected in zip(again(["a cat sat", ""]), tokenizer(["a cat sat", ""]), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "name, text", [("vocab.json", "{"), ("vocab.json", "[]"), ("merges.txt", "a"), ("tokenizer_config.json", "[]")]
)
def test_a_damaged_tokenizer_is_one_line_with_its_folder(tmp_path: Path, name: str, text: str):
    shutil.copytree(GOLDEN / "text_sd1", tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"the tokenizer in {tmp_path} is damaged: ") as error:
        Tokenizer(tmp_path, golden.TEXT_LENGTH)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "encoder, sibling",
    [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"), ("clip", "tokenizer")],
)
def test_the_sibling_folder_is_found(tmp_path: Path, encoder: str, sibling: str):
    (tmp_path / encoder).mkdir()
    with pytest.raises(FileNotFoundError, match=f"no tokenizer for .* or .*{sibling}$"):
        find_tokenizer(tmp_path / encoder)
    (tmp_path / sibling).mkdir()
    for name in FILES:
        shutil.copy(GOLDEN / "text_sd1" / name, tmp_path / sibling)
    assert find_tokenizer(tmp_path / encoder) == tmp_path / sibling
