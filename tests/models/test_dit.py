"""What the model promises: every key is alive, text acts and padding does not, remat changes only memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dit_jax.models.dit import DiT
from dit_jax.trees import count_parameters, named_leaves
from tests.models.options import OPTIONS
from tests.toy import SMALL, Toy, randomise

LAYOUT = ["blocks_0", "blocks_1", "final_layer", "pos_embed", "t_embedder", "x_embedder", "y_embedder"]


def test_the_top_of_the_parameter_tree_is_as_documented(toy):
    assert sorted(toy.params) == LAYOUT
    D, HK = SMALL["hidden_size"], SMALL["num_heads"] * SMALL["attention_head_dim"]
    leaves = named_leaves(toy.params)
    assert leaves["blocks_0/attention/qkv/kernel"].shape == (D, 3, HK)
    assert leaves["blocks_0/attention/out/kernel"].shape == (HK, D)
    assert all(leaf.dtype == jnp.float32 for leaf in leaves.values())


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 24},
        {"num_layers": 3},
        {"num_heads": 3},
        {"attention_head_dim": 8},
        {"patch_size": 1},
        {"in_channels": 4, "out_channels": 4},
        {"out_channels": 6},
        {"mlp_ratio": 3.0},
        {"mlp": "swiglu"},
        {"qk_norm": True},
        {"num_registers": 2},
        {"positions": "sincos", "base_grid": 2},
        {"text_mode": "joint"},
        {"modulation": "adaln_single"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_changed_key_changes_the_parameter_tree(toy, change):
    other = Toy(**change)
    shapes = {name: leaf.shape for name, leaf in named_leaves(toy.params).items()}
    assert {name: leaf.shape for name, leaf in named_leaves(other.params).items()} != shapes
    expected = (2, 4, 6, other.model.out_channels)
    assert other().shape == expected and np.isfinite(other()).all()


@pytest.mark.parametrize(
    "change",
    [
        {"in_channels": 4},  # out_channels stays 3
        {"out_channels": 4},
        {"hidden_size": 0},
        {"text_mode": "cros"},
        {"text_pool": "max"},
        {"modulation": "film"},
        {"remat": "some"},
        {"text_width": 0},
        {"mlp": "relu"},
        {"norm": "batch"},
        {"positions": "none"},
        {"rope": True, "base_grid": 0},
        {"rope": True, "base_grid": 2, "attention_head_dim": 6},
        {"positions": "sincos", "base_grid": 2, "hidden_size": 6},
        {"text_mode": "pooled", "text_pool": "none"},
        {"num_registers": -1},
    ],
    ids=lambda change: "-".join(change),
)
def test_a_value_that_cannot_be_is_refused_by_name(change):
    with pytest.raises(ValueError, match=f"model.({'|'.join(change)}|out_channels)"):
        DiT(**{**SMALL, **change})


@pytest.mark.parametrize(("text_mode", "branches"), [("pooled", 2), ("cross", 3)])
def test_dropout_is_on_the_mlp_activation_and_every_branch_and_nowhere_else(text_mode, branches):
    toy, dropped = Toy(text_mode=text_mode), []

    def record(call, args, kwargs, context):
        if isinstance(context.module, nn.Dropout) and context.method_name == "__call__":
            dropped.append(args[0].shape)
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        toy()
    B, N, D = toy.x.shape[0], toy.x.shape[1] * toy.x.shape[2] // SMALL["patch_size"] ** 2, SMALL["hidden_size"]
    block = [(B, N, D)] * branches + [(B, N, int(D * SMALL["mlp_ratio"]))]
    assert sorted(dropped) == sorted(block * SMALL["num_layers"])


def test_dropout_acts_in_training_only(toy):
    def train(model, key):
        return model.apply({"params": toy.params}, toy.x, toy.t, toy.text, train=True, rngs={"dropout": key})

    noisy = [train(toy.model, jax.random.key(seed)) for seed in (0, 1)]
    assert np.abs(noisy[0] - noisy[1]).max() > 1e-3
    np.testing.assert_array_equal(toy(), toy())
    still = train(DiT(**{**SMALL, "dropout": 0.0}), jax.random.key(0))
    np.testing.assert_allclose(still, toy(), rtol=1e-5, atol=1e-5)


def test_dropout_of_everything_leaves_only_the_residual_stream(toy):
    """With rate 1 every branch is dropped: the blocks do nothing, so their parameters do not matter."""
    model = DiT(**{**SMALL, "dropout": 1.0})
    other = {**toy.params, "blocks_0": randomise(toy.params["blocks_0"], 9)}
    outputs = [
        model.apply({"params": p}, toy.x, toy.t, toy.text, train=True, rngs={"dropout": jax.random.key(0)})
        for p in (toy.params, other)
    ]
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize(
    ("text_mode", "text_pool"),
    [("pooled", "eos"), ("pooled", "mean"), ("cross", "eos"), ("cross", "none"), ("joint", "mean"), ("joint", "none")],
)
def test_padding_never_changes_the_result_and_real_tokens_do(text_mode, text_pool):
    toy = Toy(text_mode=text_mode, text_pool=text_pool)

    def loss(hidden):
        return jnp.square(toy(toy.text._replace(hidden=hidden))).sum()

    gradient = np.asarray(jax.grad(loss)(toy.text.hidden))
    mask = np.asarray(toy.text.mask)
    assert (gradient[~mask] == 0).all()
    read = text_mode != "pooled" or text_pool == "mean"
    assert (np.abs(gradient[mask]).max(-1) > 0).all() == read
    shouted = toy.text._replace(hidden=jnp.where(toy.text.mask[:, :, None], toy.text.hidden, 1e4))
    np.testing.assert_array_equal(toy(shouted), toy())


def test_the_pooled_state_is_read_with_eos_and_not_with_mean():
    for text_pool, changes in (("eos", True), ("mean", False)):
        toy = Toy(text_pool=text_pool)
        moved = toy(toy.text._replace(pooled=toy.text.pooled + 1.0))
        assert (np.abs(moved - toy()).max() > 1e-3) == changes


@pytest.mark.parametrize(("text_mode", "text_pool"), [("cross", "eos"), ("cross", "mean"), ("joint", "none")])
def test_the_null_caption_is_learned(text_mode, text_pool):
    toy = Toy(text_mode=text_mode, text_pool=text_pool)

    def loss(params):
        null = toy.model.apply({"params": params}, 2, method="null_text")
        return jnp.square(toy.apply(params, toy.x, toy.t, null)).sum()

    gradients = named_leaves(jax.grad(loss)(toy.params))
    null = {name: g for name, g in gradients.items() if "null" in name}
    assert set(null) == {"y_embedder/null_token"} | ({"y_embedder/null_pooled"} if text_pool == "eos" else set())
    assert all(np.abs(g).max() > 0 for g in null.values())


def test_adaln_single_makes_its_vectors_once_for_all_blocks():
    toy = Toy(modulation="adaln_single", num_layers=3)
    leaves = {name: leaf.shape for name, leaf in named_leaves(toy.params).items() if "adaln" in name}
    tables = {f"blocks_{i}/adaln/table": (6, 16) for i in range(3)} | {"final_layer/adaln/table": (2, 16)}
    assert leaves == tables | {"adaln_single/proj/kernel": (16, 96), "adaln_single/proj/bias": (96,)}
    assert np.abs(toy.apply(toy.params, toy.x, toy.t + 0.1, toy.text) - toy()).max() > 1e-3


def test_joint_text_has_no_order_but_what_its_states_say():
    """And of the last block keys and values alone."""
    toy = Toy(text_mode="joint")
    order = np.array([2, 0, 1, 3, 4])
    shuffled = toy.text._replace(hidden=toy.text.hidden[:, order], mask=toy.text.mask[:, order])
    np.testing.assert_allclose(toy(shuffled), toy(), rtol=1e-4, atol=1e-4)
    assert set(toy.params["blocks_0"]["text"]) == {"adaln", "attention", "mlp"}
    assert set(toy.params["blocks_1"]["text"]) == {"adaln", "attention"}
    assert set(toy.params["blocks_1"]["text"]["attention"]) == {"kv"}


def test_qk_norm_takes_the_size_of_queries_and_keys_away():
    """Their projection times ten changes nothing; without the norm it changes much. Values, a third of it, stay."""
    ten = np.array([[10.0], [10.0], [1.0]])

    def enlarge(path, leaf):
        return np.asarray(leaf) * ten if "'qkv'" in str(path) else leaf

    for qk_norm, least, most in ((True, 0, 1e-3), (False, 0.05, np.inf)):
        toy = Toy(qk_norm=qk_norm, text_mode="pooled")
        params = jax.tree_util.tree_map_with_path(enlarge, toy.params)
        assert least <= np.abs(toy.apply(params, toy.x, toy.t, toy.text) - toy()).max() <= most


def test_registers_are_read_and_are_no_part_of_the_picture():
    toy = Toy(**OPTIONS["registers"])
    assert toy.params["registers"].shape == (3, 16)
    other = {**toy.params, "registers": -toy.params["registers"]}
    moved = toy.apply(other, toy.x, toy.t, toy.text)
    assert moved.shape == (2, 4, 6, 3) and np.abs(moved - toy()).max() > 1e-3


@pytest.mark.parametrize("modulation", ["adaln", "adaln_zero"])
def test_time_acts_through_the_modulation(modulation):
    toy = Toy(modulation=modulation)
    vectors = {"adaln": 4, "adaln_zero": 6}[modulation]
    assert toy.params["blocks_0"]["adaln"]["proj"]["kernel"].shape == (16, 16 * vectors)
    assert np.abs(toy.apply(toy.params, toy.x, toy.t + 0.1, toy.text) - toy()).max() > 1e-3


def test_time_scale_multiplies_the_time(toy):
    half = DiT(**{**SMALL, "time_scale": 500.0})
    ours = toy()
    theirs = half.apply({"params": toy.params}, toy.x, 2 * toy.t, toy.text, train=False)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_fresh_model_returns_zero(toy):
    params = toy.model.init(jax.random.key(0), toy.x, toy.t, toy.text, train=False)["params"]
    np.testing.assert_array_equal(toy.apply(params, toy.x, toy.t, toy.text), np.zeros((2, 4, 6, 3)))


@pytest.mark.parametrize(
    ("remat", "name", "num_layers"),
    [("dots", "cross", 2), ("full", "registers", 2), ("full", "mmdit", 2), ("dots", "joint", 2), ("full", "joint", 1)],
)
def test_remat_gives_equal_gradients(remat, name, num_layers):
    """And every parameter has one."""
    changes = {**SMALL, **OPTIONS[name], "num_layers": num_layers}
    toy = Toy(**changes)

    def gradient(model):
        def loss(params):
            out = model.apply(
                {"params": params}, toy.x, toy.t, toy.text, train=True, rngs={"dropout": jax.random.key(5)}
            )
            return jnp.square(out).mean()

        return jax.jit(jax.grad(loss))

    plain, rematted = gradient(toy.model), gradient(DiT(**{**changes, "remat": remat}))
    expected, found = named_leaves(plain(toy.params)), named_leaves(rematted(toy.params))
    assert all(np.abs(g).max() > 0 for name, g in expected.items() if "null" not in name)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert "remat" in str(jax.make_jaxpr(rematted)(toy.params))
    assert "remat" not in str(jax.make_jaxpr(plain)(toy.params))


def test_bfloat16_computes_near_float32_with_float32_parameters_and_output(toy):
    half = DiT(**SMALL, dtype=jnp.bfloat16)
    out = half.apply({"params": toy.params}, toy.x, toy.t, toy.text, train=False)
    assert out.dtype == jnp.float32
    error = np.abs(out - toy()).max() / np.abs(toy()).max()
    assert 1e-5 < error < 0.05  # not exact, or it would not be bfloat16


def test_another_latent_grid_than_that_of_training(toy):
    x = jax.random.normal(jax.random.key(0), (2, 8, 4, 3))
    assert toy.apply(toy.params, x, toy.t, toy.text).shape == (2, 8, 4, 3)


@pytest.mark.parametrize("name", ["pixart", "mmdit"])
def test_prepared_text_gives_the_same_prediction(name):
    toy = Toy(**OPTIONS[name])
    prepared = toy.model.apply({"params": toy.params}, toy.text, method="prepare_text")
    prediction = toy.model.apply({"params": toy.params}, toy.x, toy.t, prepared, False, method="predict")
    np.testing.assert_allclose(prediction, toy(), rtol=1e-5, atol=1e-5)
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(prepared))


@pytest.mark.parametrize(("modulation", "millions"), [("adaln", 19.9), ("adaln_zero", 22.2)])
def test_the_small_model_has_the_published_number_of_parameters(modulation, millions):
    from configs import small

    config = small.get_config()
    config.model.update(modulation=modulation, text_length=77, text_width=768, pooled_width=768)
    toy = DiT(**config.model)
    from dit_jax.training.state import init_params

    shapes = jax.eval_shape(lambda key: init_params(toy, key, 32, 32), jax.random.key(0))
    assert round(count_parameters(shapes) / 1e6, 1) == millions
