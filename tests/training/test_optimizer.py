"""The learning rate over a run, and which parameters decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from dit_jax.training.optimizer import OPTIMIZERS, learning_rate_schedule, make_optimizer, over_blocks
from dit_jax.trees import named_leaves


def test_warm_up_then_cosine_or_constant():
    cosine = learning_rate_schedule("cosine", 1e-3, 10, 110)
    assert [float(cosine(step)) for step in (0, 5, 10)] == pytest.approx([0.0, 5e-4, 1e-3])
    assert float(cosine(60)) == pytest.approx(5e-4) and float(cosine(110)) == pytest.approx(0.0, abs=1e-9)
    constant = learning_rate_schedule("constant", 1e-3, 10, 110)
    assert [float(constant(step)) for step in (5, 10, 109)] == pytest.approx([5e-4, 1e-3, 1e-3])
    with pytest.raises(ValueError, match="learning_rate_schedule is 'linear'; it can be cosine, constant"):
        learning_rate_schedule("linear", 1e-3, 10, 110)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_kernels_decay(toy, name):
    optimizer = make_optimizer(name, b1=0.9, b2=0.99, muon_momentum=0.95, weight_decay=0.5, clip_norm=1.0)
    zero = jax.tree.map(jnp.zeros_like, toy.params)
    updates, _ = optimizer.update(zero, optimizer.init(toy.params), toy.params)
    for name, update in named_leaves(updates).items():
        expected = -0.5 * named_leaves(toy.params)[name] if name.endswith("/kernel") else 0.0
        np.testing.assert_allclose(update, expected * np.ones(update.shape), rtol=1e-5, err_msg=name)


def test_gradients_are_clipped_by_their_global_norm():
    """Adam forgets the scale of its first gradient, so the second shows the clipping."""
    optimizer = make_optimizer("adamw", b1=0.0, b2=0.5, muon_momentum=0.95, weight_decay=0.0, clip_norm=1.0)
    params = {"kernel": jnp.zeros(2)}
    state = optimizer.init(params)
    _, state = optimizer.update({"kernel": jnp.array([0.6, 0.8])}, state, params)
    a, _ = optimizer.update({"kernel": jnp.array([6.0, 8.0])}, state, params)
    b, _ = optimizer.update({"kernel": jnp.array([0.6, 0.8])}, state, params)
    np.testing.assert_allclose(a["kernel"], b["kernel"], rtol=1e-6)


def test_muon_orthogonalises_the_kernels_of_blocks_and_leaves_the_rest_to_adamw(toy):
    keys = iter(jax.random.split(jax.random.key(0), 1000))
    grads = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), toy.params)
    updates = {}
    for name in OPTIMIZERS:
        optimizer = make_optimizer(name, b1=0.9, b2=0.99, muon_momentum=0.95, weight_decay=0.0, clip_norm=1.0)
        updates[name] = named_leaves(optimizer.update(grads, optimizer.init(toy.params), toy.params)[0])
    matrices = 0
    for name, update in updates["muon"].items():
        if name.startswith("blocks_") and name.endswith("/kernel"):
            # singular values near one (the iteration is coarse), times 0.2 * sqrt of the longer side
            scale = 0.2 * np.sqrt(max(update.shape))
            values = np.linalg.svd(update, compute_uv=False) / scale
            assert np.median(values) > 0.5 and values.max() < 1.5, name
            matrices += 1
        else:
            np.testing.assert_array_equal(update, updates["adamw"][name], err_msg=name)
    assert matrices
    with pytest.raises(ValueError, match="optimizer is 'sgd'; it can be adamw, muon"):
        make_optimizer("sgd", b1=0.9, b2=0.99, muon_momentum=0.95, weight_decay=0.0, clip_norm=1.0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_first_moments_in_16_bits_take_half_and_give_nearly_the_same_updates(toy, name):
    rates = {"b1": 0.9, "b2": 0.99, "muon_momentum": 0.95, "weight_decay": 0.0, "clip_norm": 1.0}
    draw, updates, size = np.random.default_rng(0), {}, {}
    gradients = [jax.tree.map(lambda p: draw.standard_normal(p.shape, np.float32), toy.params) for _ in range(3)]
    for dtype in ("float32", "bfloat16"):
        optimizer = make_optimizer(name, **rates, moment_dtype=dtype)
        state = optimizer.init(toy.params)
        for gradient in gradients:
            update, state = jax.jit(optimizer.update)(gradient, state, toy.params)
        updates[dtype] = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(update)])
        assert updates[dtype].dtype == np.float32
        size[dtype] = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    numbers = sum(leaf.size for leaf in jax.tree.leaves(toy.params))
    assert size["float32"] - size["bfloat16"] == 2 * numbers
    error = np.linalg.norm(updates["bfloat16"] - updates["float32"]) / np.linalg.norm(updates["float32"])
    assert 1e-4 < error < 0.02


def test_a_kernel_of_all_blocks_at_once_gets_the_updates_and_keeps_the_state_of_each_alone():
    """Also where the last block has another shape under the same name, and leaves are left to another optimizer."""

    def kernels(*columns: int) -> dict:
        return {
            f"blocks_{i}": {
                "proj": {"kernel": jax.random.normal(jax.random.key(i), (4, width))},
                "qkv": {"kernel": jax.random.normal(jax.random.key(9 + i), (4, 3, 2)), "bias": jnp.ones(6)},
            }
            for i, width in enumerate(columns)
        }

    def muon(first: int) -> optax.GradientTransformation:
        def matrices(params):
            return jax.tree.map(
                lambda p: optax.contrib.MuonDimensionNumbers(first, tuple(range(first + 1, p.ndim))), params
            )

        return optax.contrib.muon(0.1, weight_decay=0.1, muon_weight_dimension_numbers=matrices, consistent_rms=0.2)

    def of_kernels(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
        def labels(params):
            return jax.tree.map(lambda p: "kernels" if p.ndim > 1 else "rest", params)

        return optax.partition({"kernels": optimizer, "rest": optax.sgd(0.1)}, labels)

    params = kernels(8, 8, 2)
    gradients = jax.tree.map(jnp.cos, params), jax.tree.map(jnp.sin, params)
    after = []
    for optimizer in (of_kernels(over_blocks(muon(1))), of_kernels(muon(0))):
        state = optimizer.init(params)
        for gradient in gradients:
            updates, state = optimizer.update(gradient, state, params)
        after.append((updates, state))
    ours, theirs = after
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for name, leaf in named_leaves(theirs).items():
        np.testing.assert_allclose(named_leaves(ours)[name], leaf, rtol=1e-4, atol=1e-5, err_msg=name)
