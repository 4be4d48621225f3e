"""The analytic cost against published figures and the compiler."""

import jax
import jax.numpy as jnp
import pytest

from dit_jax.arrays import TextStates
from dit_jax.models.dit import DiT
from dit_jax.models.flops import DEVICES, PEAK_FLOPS, forward_macs, peak_flops, training_flops
from dit_jax.training.state import init_params
from dit_jax.trees import count_parameters, named_leaves
from tests.models.options import OPTIONS
from tests.toy import SMALL

SIZES = {"S/2": (384, 12, 6), "B/2": (768, 12, 12), "L/2": (1024, 24, 16), "XL/2": (1152, 28, 16)}


def dit(size: str) -> DiT:
    D, L, H = SIZES[size]
    return DiT(**{**SMALL, "hidden_size": D, "num_layers": L, "num_heads": H, "attention_head_dim": D // H,
                  "in_channels": 4, "out_channels": 8, "mlp_ratio": 4.0, "text_mode": "pooled",
                  "text_length": 77, "text_width": 768, "pooled_width": 768})  # fmt: skip


@pytest.mark.parametrize(("size", "giga"), [("S/2", 6.06), ("B/2", 23.01), ("L/2", 80.70), ("XL/2", 118.62)])
def test_multiply_adds_of_the_published_sizes(size, giga):
    assert forward_macs(dit(size), 32, 32) / 1e9 == pytest.approx(giga, abs=0.02)


@pytest.mark.parametrize(("size", "millions"), [("S/2", 32.9), ("B/2", 130.3), ("L/2", 457.8), ("XL/2", 674.8)])
def test_parameters_of_the_published_sizes(size, millions):
    """The published models have a class table of 1001 rows where ours projects text, and fixed positions."""
    model = dit(size)
    leaves = named_leaves(jax.eval_shape(lambda key: init_params(model, key, 32, 32), jax.random.key(0)))
    ours = count_parameters([a for name, a in leaves.items() if not name.startswith(("y_embedder", "pos_embed"))])
    assert round((ours + 1001 * model.hidden_size) / 1e6, 1) == millions


def test_the_small_model_trains_at_the_documented_cost():
    from configs import small

    config = small.get_config()
    config.model.update(text_length=77, text_width=768, pooled_width=768)
    assert training_flops(DiT(**config.model), 32, 32) / 1e9 == pytest.approx(24.2, abs=0.05)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_count_is_the_compilers_less_what_is_not_a_matrix_product(name):
    """Wide enough that norms, softmax and activations, which the formula leaves out, weigh little."""
    wide = {"hidden_size": 256, "num_heads": 4, "attention_head_dim": 64, "mlp_ratio": 4.0, "num_layers": 3}
    model = DiT(**{**SMALL, **OPTIONS[name], **wide, "text_width": 128, "pooled_width": 128})
    S, E, P = model.text_length, model.text_width, model.pooled_width
    arguments = (
        jnp.zeros((1, 4, 6, 3)),
        jnp.zeros(1),
        TextStates(jnp.zeros((1, S, E)), jnp.zeros((1, P)), jnp.ones((1, S), bool)),
    )
    params = jax.eval_shape(lambda key: init_params(model, key, 4, 6), jax.random.key(0))
    compiled = jax.jit(lambda p: model.apply({"params": p}, *arguments, train=False)).lower(params).compile()
    counted = compiled.cost_analysis()["flops"]
    assert 2 * forward_macs(model, 4, 6) == pytest.approx(counted, rel=0.03)


def test_peaks_are_found_by_the_name_that_jax_gives():
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA GeForce RTX 4090") == 165e12
    assert peak_flops("cpu") is None
    assert jnp.isfinite(peak_flops("TPU v5 lite"))


def test_every_device_of_the_table_has_a_peak():
    assert all(device.kind in PEAK_FLOPS for device in DEVICES.values())
