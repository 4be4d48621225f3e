"""The learning rate over a run, and which parameters decay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.training.optimizer import learning_rate_schedule, make_optimizer
from dit_jax.trees import named_leaves


def test_warm_up_then_cosine_or_constant():
    cosine = learning_rate_schedule("cosine", 1e-3, 10, 110)
    assert [float(cosine(step)) for step in (0, 5, 10)] == pytest.approx([0.0, 5e-4, 1e-3])
    assert float(cosine(60)) == pytest.approx(5e-4) and float(cosine(110)) == pytest.approx(0.0, abs=1e-9)
    constant = learning_rate_schedule("constant", 1e-3, 10, 110)
    assert [float(constant(step)) for step in (5, 10, 109)] == pytest.approx([5e-4, 1e-3, 1e-3])
    with pytest.raises(ValueError, match="learning_rate_schedule is 'linear'; it can be cosine, constant"):
        learning_rate_schedule("linear", 1e-3, 10, 110)


def test_only_kernels_decay(toy):
    optimizer = make_optimizer(lambda step: 0.1, b1=0.9, b2=0.99, weight_decay=0.5, clip_norm=1.0)
    zero = jax.tree.map(jnp.zeros_like, toy.params)
    updates, _ = optimizer.update(zero, optimizer.init(toy.params), toy.params)
    for name, update in named_leaves(updates).items():
        expected = -0.1 * 0.5 * named_leaves(toy.params)[name] if name.endswith("/kernel") else 0.0
        np.testing.assert_allclose(update, expected * np.ones(update.shape), rtol=1e-5, err_msg=name)


def test_gradients_are_clipped_by_their_global_norm():
    """Adam forgets the scale of its first gradient, so the second shows the clipping."""
    optimizer = make_optimizer(lambda step: 1.0, b1=0.0, b2=0.5, weight_decay=0.0, clip_norm=1.0)
    params = {"kernel": jnp.zeros(2)}
    state = optimizer.init(params)
    _, state = optimizer.update({"kernel": jnp.array([0.6, 0.8])}, state, params)
    a, _ = optimizer.update({"kernel": jnp.array([6.0, 8.0])}, state, params)
    b, _ = optimizer.update({"kernel": jnp.array([0.6, 0.8])}, state, params)
    np.testing.assert_allclose(a["kernel"], b["kernel"], rtol=1e-6)
