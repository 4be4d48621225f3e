"""The analytic cost and memory against published figures, the traced step and the compiler."""

import jax
import jax.numpy as jnp
import pytest

from dit_jax import build
from dit_jax.config import load_config
from dit_jax.models.dit import DiT
from dit_jax.models.flops import (
    DEVICES,
    PEAK_FLOPS,
    activation_bytes,
    copied_bytes,
    forward_macs,
    kept_bytes,
    peak_flops,
    training_flops,
)
from dit_jax.sharding import batch_sharding, make_mesh, with_sharding
from dit_jax.training.memory import abstract_batch, compiled_bytes, saved_bytes
from dit_jax.training.state import TrainState, abstract_state, init_params
from dit_jax.training.step import TrainStep
from dit_jax.trees import count_parameters, named_leaves
from tests.toy import SMALL, Toy

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


@pytest.mark.parametrize("text_mode", ["pooled", "cross"])
@pytest.mark.parametrize("modulation", ["adaln", "adaln_zero"])
def test_the_count_is_the_compilers_less_what_is_not_a_matrix_product(text_mode, modulation):
    """Wide enough that norms, softmax and activations, which the formula leaves out, weigh little."""
    toy = Toy(text_mode=text_mode, modulation=modulation, hidden_size=256, num_heads=4, attention_head_dim=64,
              mlp_ratio=4.0, text_width=128, pooled_width=128)  # fmt: skip
    compiled = toy.apply.lower(toy.params, toy.x[:1], toy.t[:1], jax.tree.map(lambda a: a[:1], toy.text)).compile()
    counted = compiled.cost_analysis()["flops"]
    assert 2 * forward_macs(toy.model, 4, 6) == pytest.approx(counted, rel=0.03)


def test_peaks_are_found_by_the_name_that_jax_gives():
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA GeForce RTX 4090") == 165e12
    assert peak_flops("cpu") is None
    assert jnp.isfinite(peak_flops("TPU v5 lite"))


def step_of(size: dict[str, int], batch_size: int, **changes) -> tuple[TrainStep, TrainState]:
    """A train step of `small.py` with another size, and the shapes of its state, for 32 x 32 latents."""
    config = load_config("configs/small.py", {})
    config.update(batch_size=batch_size)
    dtype = changes.pop("dtype")
    config.model.update(text_length=77, text_width=768, pooled_width=768, **size, **changes)
    config.latents.update(shift=(0.0,) * 4, scale=(1.0,) * 4)
    model, (optimizer, rate) = build.make_model(config, dtype), build.make_optimizer(config)
    step = build.make_step(config, model, build.make_process(config), optimizer, rate)
    return step, abstract_state(model, optimizer, 32, 32, make_mesh(jax.devices()[:1]))


BLOCKS = {"pooled": {"text_mode": "pooled", "modulation": "adaln"},
          "cross": {"text_mode": "cross", "modulation": "adaln_zero"}}  # fmt: skip


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_the_equation_of_memory_is_what_the_traced_step_keeps(remat, dtype, block):
    """With ``full`` so little is kept that small arrays, which the equation leaves out, weigh more."""
    step, state = step_of({"num_layers": 4}, 8, remat=remat, dtype=dtype, **BLOCKS[block])
    counted = saved_bytes(step, 8, 32, 32)
    said = 8 * kept_bytes(step.model, 32, 32) + copied_bytes(step.model, count_parameters(state.params))
    assert said == pytest.approx(counted, rel=0.12 if remat == "full" else 0.04)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_the_prediction_is_near_what_the_compiler_sets_aside(remat):
    """Two blocks of the small model in float32, which XLA for CPU computes in; not much less than it needs."""
    step, state = step_of({"num_layers": 2}, 8, remat=remat, dtype=jnp.float32)
    batch = with_sharding(
        abstract_batch(step.model, 8, 32, 32, jnp.float32), batch_sharding(make_mesh(jax.devices()[:1]))
    )
    needed = compiled_bytes(step.compile(state, batch))["total"]
    said = 5 * 4 * count_parameters(state.params) + 8 * activation_bytes(step.model, 32, 32)
    assert 0.85 < said / needed < 1.25


def test_every_device_of_the_table_has_a_peak():
    assert all(device.kind in PEAK_FLOPS for device in DEVICES.values())
