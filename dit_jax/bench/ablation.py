"""What every choice that makes the step fast is worth: the step with it and without it, by turns in one process.

What the step would do otherwise is here, and nowhere else: it takes the place of ours while the step is traced.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp

from dit_jax.arrays import Array
from dit_jax.bench.presets import Bench, make_bench
from dit_jax.bench.rounds import interleave, ratio
from dit_jax.bench.train import stepper
from dit_jax.models import blocks, embeddings, layers
from dit_jax.sharding import make_mesh, put_batch


class Choice(NamedTuple):
    """What is done, and what would be done otherwise.

    Attributes:
      says: of what is done.
      where, name: of the function or method that does it.
      otherwise: what takes its place.
    """

    says: str
    where: Any
    name: str
    otherwise: Callable[..., Any]


def plain_layer_norm(x: Array, dtype: jnp.dtype) -> Array:
    """Its gradient is what JAX derives."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return ((x - mean) * jax.lax.rsqrt(variance + layers.EPS)).astype(dtype)


def library_attention(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """JAX's own, on tokens before heads."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    seen = None if mask is None else mask[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=seen).swapaxes(1, 2)


def project_tokens(x: Array, kernel: Array) -> Array:
    """A product of ``[B, N, D]``, whose weight gradient sums over two axes."""
    return jnp.tensordot(x, kernel, 1)


CHOICES = (
    Choice("layer norm with a gradient of its own", layers, "layer_norm", plain_layer_norm),
    Choice("attention by plain products on [B, H, N, K]", blocks, "attend", library_attention),
    Choice("linear maps of [B * N, D]", embeddings, "project", project_tokens),
)


def measure_ablation(preset: str, batch: int, dtype: str, rounds: int) -> Iterator[tuple[str, Any]]:
    """Yields a row of a Markdown table for every choice, with what it says as data; dropout is 0."""
    bench, mesh = make_bench(preset, batch, dtype, 0.0), make_mesh(jax.devices()[:1])
    on_device = put_batch(bench.batch, mesh)
    with_all = runner(bench, mesh, on_device)
    yield f"{preset}, batch {batch}, {dtype}, {jax.devices()[0].device_kind}", {"preset": preset, "batch": batch}
    yield "| choice | a step without it takes so many times as long |\n|---|---|", {}
    for choice in CHOICES:
        with mock.patch.object(choice.where, choice.name, choice.otherwise):
            without = runner(bench, mesh, on_device)
        seconds = interleave({"with": with_all, "without": without}, rounds)
        found = ratio(seconds["without"], seconds["with"])
        yield f"| {choice.says} | {found} |", {choice.says: found._asdict()}


def runner(bench: Bench, mesh: jax.sharding.Mesh, batch: dict[str, jax.Array]) -> Callable[[], None]:
    """The step as it is traced now; calling it takes one and waits for it."""
    state = bench.state(mesh)
    return stepper(bench.step.compile(state, batch), state, batch)
