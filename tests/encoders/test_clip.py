"""CLIP's towers return what the published classes return, and padding changes nothing."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from dit_jax.arrays import TextStates
from dit_jax.encoders import load_text_encoder, networks, weights
from tools import make_golden_encoders as golden

GOLDEN = Path(__file__).parent / "golden"
FLAX_TEXTS = ("flax_text", "flax_text_projected", "flax_clip")  # of tools/make_golden_flax.py


def relative_error(found: jax.Array, expected: np.ndarray) -> float:
    """The largest difference, in units of the largest expected value."""
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


def check_text(folder: Path, expected: dict[str, np.ndarray]) -> None:
    """Compares the states of real tokens, those before the last block, and the pooled states."""
    ids, mask = expected["ids"], expected["mask"]
    text = load_text_encoder(folder)
    states = text.encode_ids(ids, mask)
    assert relative_error(states.hidden[mask], expected["hidden"][mask]) < 1e-4
    assert relative_error(states.pooled, expected["pooled"]) < 1e-4
    assert (text.length, text.width, text.pooled_width) == (*states.hidden.shape[1:], states.pooled.shape[1])
    inner = load_text_encoder(folder, skip_layers=1, final_norm=False).encode_ids(ids, mask)
    assert relative_error(inner.hidden[mask], expected["hidden_before_last"][mask]) < 1e-4
    assert relative_error(inner.pooled, expected["pooled"]) < 1e-4


def load_vision(folder: Path):
    """The vision tower of a whole CLIP, with its projection, and its parameters."""
    network = networks.vision_network(networks.read_config(folder), project=True, dtype=jnp.float32)
    image = jnp.zeros((1, network.image_size, network.image_size, 3))
    shapes = jax.eval_shape(network.init, jax.random.key(0), image)["params"]
    tensors = weights.read_tensors(weights.weight_files(folder))
    return network, weights.to_linen(tensors, shapes, weights.VISION_PREFIX)


def check_vision(folder: Path, expected: dict[str, np.ndarray]) -> None:
    network, params = load_vision(folder)
    hidden, pooled = jax.jit(network.apply)({"params": params}, expected["images"])
    assert relative_error(hidden, expected["image_hidden"]) < 1e-4
    assert relative_error(pooled, expected["image_pooled"]) < 1e-4


@pytest.mark.parametrize("case", [*golden.TEXTS, *FLAX_TEXTS])
def test_golden_values(case: str):
    check_text(GOLDEN / case, load_file(GOLDEN / f"{case}.expected.safetensors"))


@pytest.mark.parametrize("case", ["clip", "flax_clip"])
def test_golden_values_of_the_vision_tower(case: str):
    check_vision(GOLDEN / case, load_file(GOLDEN / f"{case}.expected.safetensors"))


@pytest.mark.parametrize("case", golden.TEXTS)
def test_the_torch_class_agrees_in_every_layout(case: str, tmp_path: Path):
    pytest.importorskip("torch")
    expected = golden.build(case, tmp_path)
    check_text(tmp_path, expected)
    if case == "clip":
        check_vision(tmp_path, expected)
    today = load_text_encoder(tmp_path)
    for rewrite in (
        golden.as_published,
        functools.partial(golden.in_type, dtype=np.dtype(np.float16)),
        functools.partial(golden.in_type, dtype=np.dtype(ml_dtypes.bfloat16)),
    ):
        rewrite(tmp_path)
        jax.tree.map(np.testing.assert_array_equal, load_text_encoder(tmp_path).params, today.params)
        if case == "clip":
            load_vision(tmp_path)


@pytest.fixture(scope="module", params=["text_sd1", "text_sd2"])
def encode(request):
    """One text tower of each way to find the end of text."""
    text = load_text_encoder(GOLDEN / request.param)
    return text.encode_ids


def caption(tokens: list[int], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of one caption."""
    row = [golden.BOS, *tokens, golden.EOS]
    padding = golden.TEXT_LENGTH - len(row)
    return np.array([row + [pad] * padding], np.int32), np.array([[True] * len(row) + [False] * padding])


def test_padding_changes_nothing(encode):
    one, other = (encode(*caption([3, 14, 15], pad)) for pad in (golden.EOS, 0))
    for name in TextStates._fields:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert not one.hidden[0, 5:].any()
    assert np.abs(np.asarray(one.hidden[0, :5])).min() > 0


def test_a_token_changes_only_what_follows_it(encode):
    one, other = (encode(*caption([3, 14, last], golden.EOS)) for last in (15, 16))
    same = np.asarray(one.hidden == other.hidden).all(axis=-1)[0]
    np.testing.assert_array_equal(same[:5], [True, True, True, False, False])
    assert np.abs(np.asarray(one.pooled - other.pooled)).max() > 1e-3


def test_pooled_is_the_state_at_the_end_of_text(encode):
    states = encode(*caption([3, 14, 15], golden.EOS))
    np.testing.assert_array_equal(states.pooled[0], states.hidden[0, 4])


def test_vision_refuses_pictures_of_another_size():
    network, params = load_vision(GOLDEN / "clip")
    with pytest.raises(ValueError, match="16 px squares, got 16 x 20"):
        network.apply({"params": params}, jnp.zeros((1, 16, 20, 3)))


@pytest.mark.slow
def test_the_torch_class_agrees_at_full_size(tmp_path: Path):
    torch = pytest.importorskip("torch")
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768, eos_token_id=2
    )
    tower = CLIPTextModel(config).eval()
    tower.save_pretrained(tmp_path)
    ids = np.full((2, 77), 49407, np.int32)
    ids[:, :4] = [[49406, 320, 2368, 49407], [49406, 736, 7117, 4348]]
    mask = np.arange(77)[None] < np.array([4, 77])[:, None]
    with torch.no_grad():
        expected = tower(torch.from_numpy(ids).long())
    network = networks.text_network(
        networks.read_config(tmp_path), project=False, skip_layers=0, final_norm=True, dtype=jnp.float32
    )
    shapes = jax.eval_shape(network.init, jax.random.key(0), ids, mask)["params"]
    params = weights.to_linen(weights.read_tensors(weights.weight_files(tmp_path)), shapes, weights.TEXT_PREFIX)
    states = jax.jit(network.apply)({"params": params}, ids, mask)
    assert relative_error(states.hidden[mask], expected.last_hidden_state.numpy()[mask]) < 1e-4
    assert relative_error(states.pooled, expected.pooler_output.numpy()) < 1e-4
