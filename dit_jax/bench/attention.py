"""The ways to compute attention, forward and backward, by turns: at the shape of a preset, on this device."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from dit_jax.bench.presets import make_bench
from dit_jax.bench.rounds import interleave, ratio
from dit_jax.models.layers import attend


def ways() -> dict[str, Callable[..., Any]]:
    """By name: queries, keys and values ``[B, H, N, K]`` to what the heads found; those that this device may have."""

    def library(implementation: str) -> Callable[..., Any]:
        def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
            return jax.nn.dot_product_attention(q, k, v, implementation=implementation).swapaxes(1, 2)

        return attention

    found = {"products on [B, H, N, K]": lambda q, k, v: attend(q, k, v, None), "jax.nn (xla)": library("xla")}
    if jax.default_backend() == "gpu":
        found["jax.nn (cudnn)"] = library("cudnn")
    return found


def measure_attention(preset: str, batch: int, dtype: str, rounds: int) -> Iterator[tuple[str, Any]]:
    """Yields a row of a Markdown table for every way, with what it says as data; the first is what the model does."""
    model = make_bench(preset, batch, dtype, 0.0).model
    N = model.base_grid**2 or 256
    shape = (batch, model.num_heads, N, model.attention_head_dim)
    q, k, v, g = (jax.random.normal(key, shape, model.dtype) for key in jax.random.split(jax.random.key(0), 4))

    def runner(attention: Callable[..., Any]) -> Callable[[], None]:
        def both(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
            return jax.vjp(attention, q, k, v)[1](g)

        compiled = jax.jit(both).lower(q, k, v).compile()
        return lambda: jax.block_until_ready(compiled(q, k, v))

    yield (
        f"attention on {jax.devices()[0].device_kind}, [B, H, N, K] = {list(shape)}, {jnp.dtype(model.dtype).name}",
        {"shape": shape},
    )
    yield "| way | ms, forward and backward | times as long as the model's |\n|---|---|---|", {}
    candidates = {}
    for name, attention in ways().items():
        try:
            candidates[name] = runner(attention)
        except (NotImplementedError, RuntimeError, ValueError) as error:  # this device, shape or type has it not
            yield f"| {name} | {str(error).splitlines()[0]:.60} | |", {name: str(error)}
    seconds = interleave(candidates, rounds)
    first = next(iter(seconds))
    for name, taken in seconds.items():
        compared = ratio(taken, seconds[first])
        yield f"| {name} | {sorted(taken)[len(taken) // 2] * 1e3:.1f} | {compared} |", {name: taken.tolist()}
