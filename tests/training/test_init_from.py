"""What fits of another model is taken, bit for bit; what does not is named and stays as it was."""

import jax
import numpy as np

from dit_jax.origin import MEANINGS
from dit_jax.training.init_from import POSITIONS, transfer
from dit_jax.training.state import init_params
from dit_jax.trees import named_leaves
from tests.toy import Toy, randomise

MEANT = {
    "plain": {},
    "mlp": {"mlp": "gelu"},
    "norm": {"norm": "rms"},
    "rope": {"rope": True, "base_grid": 2},
    "positions": {"positions": "sincos", "base_grid": 2},
    "base_grid": {"positions": "none", "rope": True, "base_grid": 3},
}


def leaves_after(old, **changes):
    """The transfer into a fresh model with changes, and names and leaves of the fresh one."""
    grid = changes.pop("grid", (4, 6))
    model = Toy(**changes).model
    fresh = randomise(jax.eval_shape(lambda key: init_params(model, key, *grid), jax.random.key(0)), 7)
    return transfer(old, fresh), named_leaves(fresh)


def test_the_same_model_is_taken_whole(toy):
    found, _ = leaves_after(toy.params)
    jax.tree.map(np.testing.assert_array_equal, found.params, toy.params)
    assert not (found.resampled or found.new or found.dropped or found.misshapen)


def test_every_parameter_that_differs_is_named_and_stays_fresh(toy):
    found, fresh = leaves_after(toy.params, num_layers=3, text_mode="pooled", mlp_ratio=3.0)
    named, old = named_leaves(found.params), named_leaves(toy.params)
    assert {name.split("/")[0] for name in found.new} == {"blocks_2"}
    assert any(name.startswith("blocks_0/cross/") for name in found.dropped)
    assert "y_embedder/null_token" in found.dropped
    assert "blocks_1/mlp/fc_in/kernel (16, 32) -> (16, 48)" in found.misshapen
    for name, leaf in named.items():
        np.testing.assert_array_equal(leaf, old[name] if name in found.taken else fresh[name], err_msg=name)
    misshapen = [line.split(" ")[0] for line in found.misshapen]
    assert sorted([*found.taken, *found.new, *misshapen]) == sorted(fresh)
    assert sorted([*found.taken, *found.dropped, *misshapen]) == sorted(old)


def test_positions_of_another_grid_are_resampled_as_the_model_itself_resamples_them(toy):
    found, _ = leaves_after(toy.params, grid=(8, 8))
    assert found.resampled == [POSITIONS] and not (found.new or found.dropped or found.misshapen)
    x = jax.random.normal(jax.random.key(3), (2, 8, 8, 3))
    np.testing.assert_allclose(
        toy.apply(found.params, x, toy.t, toy.text), toy.apply(toy.params, x, toy.t, toy.text), atol=1e-5
    )


def test_a_longer_joint_model_takes_what_it_can(toy):
    """What was the last block reads and writes text now; two registers and a variance are new."""
    old = Toy(text_mode="joint").params
    found, _ = leaves_after(old, text_mode="joint", num_layers=3, num_registers=2, out_channels=6)
    assert {"registers", "blocks_1/text/attention/qkv/kernel", "blocks_2/adaln/proj/kernel"} <= set(found.new)
    assert "blocks_1/text/attention/kv/kernel" in found.dropped
    misshapen = [line.split(" ")[0] for line in found.misshapen]
    assert misshapen == [
        *(f"blocks_1/text/adaln/proj/{leaf}" for leaf in ("bias", "kernel")),
        *(f"final_layer/linear/{leaf}" for leaf in ("bias", "kernel")),
    ]


def test_options_that_leave_the_shapes_alone_are_known_as_meanings():
    """Such a change cannot be seen in the parameters: a run that begins with them must be told by the config."""
    shapes = {}
    for name, options in MEANT.items():
        model = Toy(**options).model
        tree = jax.eval_shape(lambda key, model=model: init_params(model, key, 4, 6), jax.random.key(0))
        shapes[name] = {leaf: a.shape for leaf, a in named_leaves(tree).items()}
    assert shapes["mlp"] == shapes["norm"] == shapes["rope"] == shapes["plain"]
    assert shapes["positions"] == shapes["base_grid"]
    assert {f"model.{name}" for name in MEANT if name != "plain"} <= set(MEANINGS)
