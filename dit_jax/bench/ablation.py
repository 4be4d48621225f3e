"""What every choice that makes the step fast or small is worth: steps with and without it, by turns in one process.

What the step would do otherwise is here, and nowhere else: it takes the place of ours while the step is traced.
"""

import dataclasses
import functools
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
from dit_jax.training.memory import compiled_bytes
from dit_jax.training.state import TrainState
from dit_jax.training.step import Batch, TrainStep


class Candidate(NamedTuple):
    """A step that can be taken.

    Attributes:
      run: takes one, waits for it, and returns its metrics.
      program: that it runs.
      bytes: that are set aside for it, with all that it is given.
    """

    run: Callable[[], dict[str, Array]]
    program: jax.stages.Compiled
    bytes: int


MakeBench = Callable[..., Bench]  # `make_bench` with all but the changes
Otherwise = Callable[[MakeBench], Candidate]


def on_device(bench: Bench) -> tuple[TrainState, Batch]:
    """A fresh state and the batch, on the first device."""
    mesh = make_mesh(jax.devices()[:1])
    return bench.state(mesh), put_batch(bench.batch, mesh)


def candidate(program: jax.stages.Compiled, state: TrainState, batch: Batch) -> Candidate:
    """A step that is one program."""
    return Candidate(stepper(program, state, batch), program, compiled_bytes(program)["total"])


def ours(make: MakeBench) -> Candidate:
    """The step of the trainer, as its functions are now."""
    bench = make()
    state, batch = on_device(bench)
    return candidate(bench.step.compile(state, batch), state, batch)


# --- functions -----------------------------------------------------------------------------------------------------


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


def project_apart(x: Array, kernel: Array) -> Array:
    """A product for each of the maps that one kernel holds."""
    if kernel.ndim == 2:
        return project_flat(x, kernel)
    return jnp.stack([project_flat(x, kernel[:, part]) for part in range(kernel.shape[1])], axis=-2)


project_flat = embeddings.project


def instead(where: Any, name: str, function: Callable[..., Any]) -> Otherwise:
    """Another function in the place of that of this name, while the step is traced."""

    def make_candidate(make: MakeBench) -> Candidate:
        with mock.patch.object(where, name, function):
            return ours(make)

    return make_candidate


# --- the whole step ------------------------------------------------------------------------------------------------


def change(**changes: Any) -> Otherwise:
    """Another value of a key of the config, whose dots are written as double underscores."""
    return lambda make: ours(functools.partial(make, {key.replace("__", "."): v for key, v in changes.items()}))


def keep_state(make: MakeBench) -> Candidate:
    """The state that the step is given stays beside the one that it makes."""
    bench = make()
    state, batch = on_device(bench)
    return candidate(jax.jit(bench.step).lower(state, batch).compile(), state, batch)


class StepAlone(TrainStep):
    """All but the moving average, which the state then lacks."""

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        """One update."""
        state, metrics = super().__call__(dataclasses.replace(state, ema=state.params), batch)
        return dataclasses.replace(state, ema=()), metrics


def average_apart(make: MakeBench) -> Candidate:
    """The moving average is a program of its own, which reads the parameters again; its decay is that of a long run."""
    bench = make()
    state, batch = on_device(bench)
    step = StepAlone(**{field.name: getattr(bench.step, field.name) for field in dataclasses.fields(bench.step)})
    ema, state = state.ema, dataclasses.replace(state, ema=())

    def move(ema: Any, params: Any) -> Any:
        return jax.tree.map(lambda e, p: e + (1.0 - step.ema_decay) * (p - e), ema, params)

    program = step.compile(state, batch)
    average = jax.jit(move, donate_argnums=0).lower(ema, state.params).compile()

    def run() -> dict[str, Array]:
        nonlocal state, ema
        state, metrics = program(state, batch)
        ema = jax.block_until_ready(average(ema, state.params))
        return metrics

    beside = sum(leaf.nbytes for leaf in jax.tree.leaves(ema))  # the average, while the step is taken
    return Candidate(run, program, compiled_bytes(program)["total"] + beside)


# By what the step does: what it would do otherwise, in a word, and a step that does.
CHOICES: dict[str, tuple[str, Otherwise]] = {
    "a gradient of its own for layer norm": ("JAX's", instead(layers, "layer_norm", plain_layer_norm)),
    "attention by plain products on [B, H, N, K]": (
        "jax.nn.dot_product_attention",
        instead(blocks, "attend", library_attention),
    ),
    "linear maps of [B * N, D]": ("of [B, N, D]", instead(embeddings, "project", project_tokens)),
    "queries, keys and values by one product": ("by three", instead(embeddings, "project", project_apart)),
    "the moving average in the step": ("in a program of its own", average_apart),
    "the state given away": ("kept until the step is done", keep_state),
    "what the backward pass needs kept": ("model.remat=dots", change(model__remat="dots")),
    "and nothing of it computed again": ("model.remat=full", change(model__remat="full")),
    "first moments in float32": ("moment_dtype=bfloat16", change(moment_dtype="bfloat16")),
}


def measure_ablation(preset: str, batch: int, dtype: str, rounds: int) -> Iterator[tuple[str, Any]]:
    """Yields a row of a Markdown table for every choice, with what it says as data; dropout is 0."""
    make = functools.partial(make_bench, preset, batch, dtype, 0.0)
    with_all = ours(make)
    yield (
        f"{preset}, batch {batch}, {dtype}, {jax.devices()[0].device_kind}: {with_all.bytes / 2**20:,.0f} MiB",
        {"preset": preset, "batch": batch, "bytes": with_all.bytes},
    )
    yield (
        "| the step has | otherwise | takes so many times as long | and so many times the memory |\n|---|---|---|---|",
        {},
    )
    for choice, (word, otherwise) in CHOICES.items():
        without = otherwise(make)
        seconds = interleave({"with": with_all.run, "without": without.run}, rounds)
        found, memory = ratio(seconds["without"], seconds["with"]), without.bytes / with_all.bytes
        yield f"| {choice} | {word} | {found} | {memory:.2f} |", {choice: {**found._asdict(), "bytes": without.bytes}}
