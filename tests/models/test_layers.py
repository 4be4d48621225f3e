"""The pieces of blocks against their equations, in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.models.dit import DiT
from dit_jax.models.layers import BlockSpec, Mlp, layer_norm, rms_norm
from tests.toy import SMALL, randomise


def test_norms_are_their_equations():
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 3, 8))) * 3 + 1
    layer = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(layer_norm(x, jnp.float32), layer, rtol=1e-4, atol=1e-5)
    rms = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(rms_norm(x, jnp.float32), rms, rtol=1e-4, atol=1e-5)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(("kind", "width"), [("silu", 32), ("gelu", 32), ("swiglu", 24)])
def test_the_mlp_is_its_equation(kind, width):
    """SwiGLU of two thirds of 32, in steps of 8, is 24 wide; its first kernel holds W_1 and W_3, fused."""
    spec: BlockSpec = DiT(**{**SMALL, "mlp": kind, "norm": "rms"}).spec
    assert spec.mlp_width == width
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 3, 16)))
    module = Mlp(spec)
    params = jax.device_get(randomise(module.init(jax.random.key(1), x, False)["params"], 2))
    first = np.tensordot(x, params["fc_in"]["kernel"], 1) + params["fc_in"]["bias"]
    inner = {"silu": silu, "gelu": gelu, "swiglu": lambda y: silu(y[..., 0, :]) * y[..., 1, :]}[kind](first)
    expected = inner @ params["fc_out"]["kernel"] + params["fc_out"]["bias"]
    np.testing.assert_allclose(module.apply({"params": params}, x, False), expected, rtol=1e-4, atol=1e-4)
