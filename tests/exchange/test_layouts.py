"""Parameters of other layouts become ours: bit for bit where they are ours, the same function where they are not."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from dit_jax import build, origin
from dit_jax.arrays import TextStates
from dit_jax.errors import CheckpointError, ConfigError
from dit_jax.exchange import layouts
from dit_jax.resolve import resolve
from dit_jax.sharding import make_mesh
from dit_jax.training.formats import side_by_side
from dit_jax.training.state import TrainState, init_state
from dit_jax.trees import named_leaves
from tests.models.options import OPTIONS
from tests.tiny_run import tiny_config
from tests.toy import Toy, randomise

SIDE, D, LAYERS = 8, 16, 2  # latents of 8 x 8, 4 x 4 patches
DIT = {  # the tiny run's model with the reference's block
    "data__image_size": "64", "model__hidden_size": str(D), "model__num_layers": str(LAYERS), "model__mlp": "gelu",
    "model__modulation": "adaln_zero", "model__text_mode": "pooled",
}  # fmt: skip


def config_and_state(**changes: str) -> tuple:
    config = tiny_config(**{**DIT, **changes})
    resolve(config, 100, *build.describe_encoders(config), 1)
    model = build.make_model(config, jnp.float32)
    optimizer, _ = build.make_optimizer(config)
    state = init_state(model, optimizer, jax.random.key(0), SIDE, SIDE, make_mesh(jax.devices()[:1]))
    return config, model, state


@pytest.fixture(scope="module")
def new() -> tuple:
    return config_and_state()


def begin(path, config, state: TrainState) -> tuple[TrainState, list[str]]:
    said: list[str] = []
    config.init_from = str(path)
    return origin.begin_from(config, {}, state, 8, said.append), said


def reference(out_channels: int) -> dict[str, np.ndarray]:
    """Random parameters by the names and shapes of facebookresearch/DiT."""
    draw = np.random.default_rng(0).standard_normal
    tensors = {
        "x_embedder.proj": (D, 4, 2, 2),
        "t_embedder.mlp.0": (D, 256),
        "t_embedder.mlp.2": (D, D),
        "final_layer.linear": (4 * out_channels, D),
        "final_layer.adaLN_modulation.1": (2 * D, D),
    }
    for i in range(LAYERS):
        tensors |= {
            f"blocks.{i}.attn.qkv": (3 * D, D),
            f"blocks.{i}.attn.proj": (D, D),
            f"blocks.{i}.mlp.fc1": (4 * D, D),
            f"blocks.{i}.mlp.fc2": (D, 4 * D),
            f"blocks.{i}.adaLN_modulation.1": (6 * D, D),
        }
    found = {f"{name}.weight": 0.3 * draw(shape) for name, shape in tensors.items()}
    found |= {f"{name}.bias": 0.3 * draw(shape[:1]) for name, shape in tensors.items()}
    found |= {"y_embedder.embedding_table.weight": np.zeros((11, D)), "pos_embed": draw((1, 16, D))}
    return {name: np.asarray(array, np.float32) for name, array in found.items()}


def diffusers_twin(tensors: dict[str, np.ndarray], out_channels: int):
    """diffusers' own DiT with these parameters, by the names that it gives them."""
    import torch
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=D // 2, in_channels=4, out_channels=out_channels,
        num_layers=LAYERS, sample_size=SIDE, patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    model.pos_embed.pos_embed = torch.tensor(tensors["pos_embed"])  # which it computes itself, and does not save
    state = {}
    renamed = {"pos_embed.proj": "x_embedder.proj", "proj_out_1": "final_layer.adaLN_modulation.1",
               "proj_out_2": "final_layer.linear"}  # fmt: skip
    for i in range(LAYERS):
        here, there = f"transformer_blocks.{i}", f"blocks.{i}"
        embedder = f"{here}.norm1.emb"
        state[f"{embedder}.class_embedder.embedding_table.weight"] = tensors["y_embedder.embedding_table.weight"]
        renamed |= {
            f"{embedder}.timestep_embedder.linear_1": "t_embedder.mlp.0",
            f"{embedder}.timestep_embedder.linear_2": "t_embedder.mlp.2",
            f"{here}.norm1.linear": f"{there}.adaLN_modulation.1",
            f"{here}.attn1.to_out.0": f"{there}.attn.proj",
            f"{here}.ff.net.0.proj": f"{there}.mlp.fc1",
            f"{here}.ff.net.2": f"{there}.mlp.fc2",
        }
        for kind in ("weight", "bias"):
            parts = np.split(tensors[f"{there}.attn.qkv.{kind}"], 3)
            state |= {f"{here}.attn1.to_{name}.{kind}": part for name, part in zip("qkv", parts, strict=True)}
    for theirs, name in renamed.items():
        state |= {f"{theirs}.{kind}": tensors[f"{name}.{kind}"] for kind in ("weight", "bias")}
    model.load_state_dict({name: torch.tensor(array) for name, array in state.items()})
    return model.eval()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # inside diffusers
@pytest.mark.parametrize("out_channels", [4, 8], ids=["plain", "learned variance"])
def test_the_reference_layout_computes_what_it_computes_elsewhere(new, out_channels, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    config, model, state = new
    tensors = reference(out_channels)
    save_file(tensors, tmp_path / "DiT.safetensors")
    state, said = begin(tmp_path / "DiT.safetensors", config, state)
    params = jax.tree.map(jnp.asarray, state.params)
    params["y_embedder"] = jax.tree.map(jnp.zeros_like, params["y_embedder"])  # no text, as the table of classes is 0
    x = np.random.default_rng(1).standard_normal((2, SIDE, SIDE, 4)).astype(np.float32)
    text = TextStates(*(jnp.zeros(s) for s in ((2, model.text_length, model.text_width), (2, model.pooled_width))),
                      jnp.ones((2, model.text_length), bool))  # fmt: skip
    # at t = 0, as diffusers spaces the frequencies of times in another way than the reference
    ours = model.apply({"params": params}, x, jnp.zeros(2), text, train=False)
    twin = diffusers_twin(tensors, out_channels)
    with torch.no_grad():
        theirs = twin(torch.tensor(x).movedim(-1, 1), torch.zeros(2), class_labels=torch.zeros(2, dtype=int)).sample
    theirs = theirs.movedim(1, -1).numpy()[..., :4]
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-4 * np.abs(theirs).max()

    lines = "\n".join(said)
    assert "in the layout of reference: " in lines
    assert "no counterpart: y_embedder.embedding_table.weight (11, 16) (a table of classes, and this model" in lines
    assert "this run from 1" not in lines  # rectified flow has no steps to count
    assert "init_from is for diffusion.schedule=linear, this run has rectified_flow" in lines
    assert ("dropped: channels of a learned variance in final_layer/linear/kernel" in lines) == (out_channels == 8)
    assert {line.split(": ")[2] for line in said if ": new: " in line} == {
        name for name in named_leaves(state.params) if name.startswith("y_embedder/")
    }
    assert not any("misshapen" in line for line in said)


@pytest.mark.parametrize("case", OPTIONS)
def test_our_layout_for_torch_comes_back_bit_for_bit(case, tmp_path):
    toy = Toy(**OPTIONS[case])
    leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(side_by_side(toy.params)).items()}
    save_file(layouts.to_torch(leaves), tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = layouts.read_parameters(tmp_path / "x.safetensors")
    assert found.layout == "torch" and found.leaves.keys() == leaves.keys() and not found.strangers
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(found.leaves[name], leaf, err_msg=name)


@pytest.mark.parametrize("layout", ["dit_jax", "torch"])
def test_a_new_run_begins_with_a_file_bit_for_bit(new, layout, tmp_path):
    config, _, state = new
    params = randomise(state.params, 5)
    leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(side_by_side(params)).items()}
    save_file(layouts.to_torch(leaves) if layout == "torch" else leaves, tmp_path / "x.safetensors")
    begun, said = begin(tmp_path / "x.safetensors", config, state)
    jax.tree.map(np.testing.assert_array_equal, begun.params, params)
    jax.tree.map(np.testing.assert_array_equal, begun.ema, params)
    count = len(leaves)
    assert f"init_from: {tmp_path / 'x.safetensors'}, in the layout of {layout}: {count} of {count} taken over" in said
    assert "does not say what it was trained with" in said[0]


def test_maps_that_have_an_axis_of_their_own_are_filled_from_those_side_by_side():
    flat = np.arange(24).reshape(2, 12)
    whole = layouts.reshaped(flat, types.SimpleNamespace(ndim=3, shape=(2, 3, 4)))
    np.testing.assert_array_equal(whole[:, 1], flat[:, 4:8])
    assert layouts.reshaped(flat, types.SimpleNamespace(ndim=2, shape=(2, 9))) is flat


def test_files_that_hold_no_model_end_in_one_line(new, tmp_path):
    config, _, state = new
    save_file({"conv.weight": np.zeros((2, 2), np.float32)}, tmp_path / "other.safetensors")
    save_file({"t_embedder.mlp.0.weight": np.zeros((2, 2), np.float32)}, tmp_path / "small.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
    header = b'{"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}'
    (tmp_path / "short.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    for name, error, words in (
        ("other.safetensors", ConfigError, "holds no DiT of a known layout .*: it begins with conv.weight"),
        ("small.safetensors", ConfigError, "nothing of init_from="),
        ("damaged.safetensors", CheckpointError, "damaged.safetensors is damaged"),
        ("short.safetensors", CheckpointError, "short.safetensors has numbers of 8 bits, which are not read"),
        ("absent.safetensors", ConfigError, "there is no file"),
        ("DiT-XL-2-256x256.pt", ConfigError, "is a pickle, which can run code and is not read"),
    ):
        with pytest.raises(error, match=words):
            begin(tmp_path / name, config, state)
