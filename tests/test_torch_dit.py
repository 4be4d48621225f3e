"""The DiT in PyTorch that ships with the package computes what ours does, whatever the model is made of."""

import ast
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import dit_jax
from dit_jax.arrays import TextStates
from dit_jax.models.dit import CHOICES, DiT
from dit_jax.training.formats import side_by_side
from dit_jax.trees import named_leaves
from tests.models.options import OPTIONS
from tests.toy import Toy

SOURCE = Path(dit_jax.__file__).parent / "assets" / "torch" / "dit.py"
TORCH_AND_STANDARD = {"torch", *sys.stdlib_module_names}
CASES = {
    **OPTIONS,
    "learned variance": {"out_channels": 6, "modulation": "adaln_zero"},
    "another grid": {},
    "remat full": {"remat": "full"},
    "remat dots": {"remat": "dots", "text_mode": "joint"},
}


def test_the_file_stands_alone():
    nodes = ast.walk(ast.parse(SOURCE.read_text(encoding="utf-8")))
    named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    nodes = ast.walk(ast.parse(SOURCE.read_text(encoding="utf-8")))
    named |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in named} <= TORCH_AND_STANDARD


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("torch_dit", SOURCE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks for its types
    spec.loader.exec_module(module)
    return module


def test_it_computes_every_choice_and_refuses_what_it_does_not_know(theirs):
    """A word that only one of the two files learnt would otherwise be taken for another one."""
    assert theirs.CHOICES == CHOICES
    config = config_of(Toy().model)
    assert theirs.Config.of(config).mlp == config["mlp"]
    for key in CHOICES:
        with pytest.raises(ValueError, match=f"{key} is 'relu2'; this file computes {', '.join(CHOICES[key])}"):
            theirs.Config.of(config | {key: "relu2"})


def config_of(model: DiT) -> dict:
    return {name: getattr(model, name) for name in DiT.__dataclass_fields__ if name not in ("parent", "name", "dtype")}


def to_torch(torch, model: DiT, x, t, text):
    """Inputs, with channels where PyTorch has them."""
    arrays = (np.moveaxis(np.asarray(x), -1, 1), t, *text)
    return [torch.tensor(np.asarray(a)) for a in arrays]


def exported(toy: Toy, folder: Path) -> tuple[Path, Path]:
    leaves = {name: np.ascontiguousarray(leaf) for name, leaf in named_leaves(side_by_side(toy.params)).items()}
    save_file(leaves, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model": config_of(toy.model), "seed": 0}))
    return folder / "config.json", folder / "model.safetensors"


def assert_near(found, expected, what: str) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape, what
    assert np.abs(found - expected).max() <= 1e-4 * max(np.abs(expected).max(), 1e-2), what


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_same_parameters(theirs, case, tmp_path):
    import torch

    toy = Toy(**CASES[case])
    x = jax.random.normal(jax.random.key(3), (2, 8, 10, 3)) if case == "another grid" else toy.x

    def loss(params):
        out = toy.model.apply({"params": params}, x, toy.t, toy.text, train=False)
        return jnp.square(out).mean(), out

    (_, expected), expected_grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(toy.params)
    model = theirs.load(*exported(toy, tmp_path)).eval()
    out = model(*to_torch(torch, toy.model, x, toy.t, toy.text))
    assert_near(np.moveaxis(out.detach().numpy(), 1, -1), expected, "output")
    out.square().mean().backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    leaves = theirs.from_leaves(
        {n: torch.tensor(np.asarray(g)) for n, g in named_leaves(side_by_side(expected_grads)).items()}
    )
    assert leaves.keys() == grads.keys()
    for name, leaf in leaves.items():
        assert_near(grads[name], leaf, name)
        assert leaf.abs().max() > 0 or "null" in name


@pytest.mark.parametrize("name", ["tutorial", "cross", "pixart"])
def test_the_null_caption_is_the_same(theirs, name, tmp_path):
    toy = Toy(**OPTIONS[name])
    null = theirs.load(*exported(toy, tmp_path)).null_text(2)
    expected = toy.model.apply({"params": toy.params}, 2, method="null_text")
    for ours, torchs in zip(expected, null, strict=True):
        np.testing.assert_array_equal(torchs.detach().numpy(), ours)


def test_dropout_acts_in_training_only_and_drops_what_ours_drops(theirs, tmp_path):
    """With rate 1 every branch is dropped: the blocks do nothing, so their parameters do not matter."""
    import torch

    toy = Toy(dropout=1.0)
    model = theirs.load(*exported(toy, tmp_path))
    inputs = to_torch(torch, toy.model, toy.x, toy.t, toy.text)
    rngs = {"dropout": jax.random.key(0)}
    expected = toy.model.apply({"params": toy.params}, toy.x, toy.t, toy.text, train=True, rngs=rngs)
    assert_near(np.moveaxis(model.train()(*inputs).detach().numpy(), 1, -1), expected, "training")
    assert_near(np.moveaxis(model.eval()(*inputs).detach().numpy(), 1, -1), toy(), "evaluation")


def test_lower_precision_is_near_with_a_float32_output(theirs, tmp_path):
    import torch

    toy = Toy(**OPTIONS["mmdit"])
    model = theirs.load(*exported(toy, tmp_path)).eval()
    inputs = to_torch(torch, toy.model, toy.x, toy.t, toy.text)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cast = model(*inputs)
    with torch.no_grad():
        half = model.to(torch.bfloat16)(*inputs)
    for out in (cast, half):
        assert out.dtype == torch.float32
        error = np.abs(np.moveaxis(out.numpy(), 1, -1) - toy()).max() / np.abs(toy()).max()
        assert 1e-5 < error < 0.1


def test_a_config_that_lacks_a_field_is_refused_by_name(theirs):
    with pytest.raises(KeyError, match="hidden_size"):
        theirs.Config.of({})


def test_text_states_have_the_order_of_the_arguments():
    assert TextStates._fields == ("hidden", "pooled", "mask")
