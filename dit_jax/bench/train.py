"""How fast the train step is, against the limit of the device and against PyTorch.

    images/s = B / seconds of a step (median of the rounds)
    MFU      = images/s * F / (devices * peak)      F of `dit_jax.models.flops`: matrix products of the model alone
    HFU      = the same with the FLOP that the compiler counts: optimizer, norms and what remat computes again too

The peak is the one of the device's data sheet; of a CPU, which has none, the fastest matrix product that was seen.
The batch is on the device already: how fast data come is measured by ``python -m dit_jax.bench data``.
"""

import os
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dit_jax
from dit_jax.bench.compiling import compile_twice
from dit_jax.bench.presets import SIDE, Bench, make_bench
from dit_jax.bench.rounds import interleave, ratio
from dit_jax.models.flops import peak_flops, training_flops
from dit_jax.runtime import git_commit
from dit_jax.sharding import make_mesh, put_batch
from dit_jax.training.memory import compiled_bytes
from dit_jax.trees import count_parameters

MIB = 2**20
DROPOUT = (0.0, 0.1)  # of the rows: without it, as benchmarks are compared, and as the small model is trained
ROOF = ((2048, 384, 1536), (2048, 2048, 2048), (4096, 1152, 4608))  # products tried for the peak of a CPU


def measure_training(
    preset: str, batch: int, dtype: str, rounds: int, against_torch: bool
) -> Iterator[tuple[str, Any]]:
    """Measure a preset; yields lines to print, each with what it says as data.

    Args:
      preset: of `dit_jax.bench.presets.PRESETS`.
      batch: pictures a step.
      dtype: ``float32`` or ``bfloat16``, of the arithmetic.
      rounds: how many steps of each candidate count.
      against_torch: whether to take the same step with PyTorch.
    """
    kind, count = jax.devices()[0].device_kind, len(jax.devices())
    versions = {name: version(name) for name in ("jax", "flax", "optax", *(["torch"] if against_torch else []))}
    said = ", ".join(f"{name} {number}" for name, number in versions.items())
    yield f"dit_jax {dit_jax.__version__} ({git_commit()}), {said}", {"versions": versions}
    peak = peak_flops(kind)
    where = "data sheet, bfloat16" if peak else "the fastest product seen, float32"
    peak = peak or measured_peak()
    cores = f", {os.cpu_count()} cores" if jax.default_backend() == "cpu" else ""
    yield f"{count} x {kind}{cores}, peak {peak / 1e12:.3f} TFLOP/s ({where})", {"device": kind, "peak": peak}
    for dropout in DROPOUT:
        bench = make_bench(preset, batch, dtype, dropout)
        yield from _measure_row(bench, preset, rounds, against_torch, peak * count, dropout)


def _measure_row(
    bench: Bench, preset: str, rounds: int, against_torch: bool, peak: float, dropout: float
) -> Iterator[tuple[str, Any]]:
    """The lines of one rate of dropout."""
    mesh = make_mesh(jax.devices())
    batch, state = put_batch(bench.batch, mesh), bench.state(mesh)
    B, config = len(bench.batch["mean"]), bench.config
    parameters = count_parameters(state.params)
    yield (
        f"\n{preset}: {parameters / 1e6:.1f} M parameters, batch {B}, {config.dtype}, dropout {dropout:g}",
        {"preset": preset, "parameters": parameters, "batch": B, "dtype": config.dtype, "dropout": dropout},
    )
    made = compile_twice(bench.step, state, batch)
    yield (
        f"compiled in {made.cold:.1f} s, from the cache in {made.warm:.1f} s; {made.instructions:,} instructions",
        {"compile_cold": made.cold, "compile_warm": made.warm, "instructions": made.instructions},
    )
    sizes = compiled_bytes(made.program)
    yield ", ".join(f"{what} {n / MIB:,.0f} MiB" for what, n in sizes.items()), {"bytes": sizes}

    candidates: dict[str, Callable[[], Any]] = {"dit_jax": stepper(made.program, state, batch)}
    if against_torch:
        from dit_jax.bench import agreement, reference

        params = jax.device_get(state.params)
        found = agreement.agree(bench, params)
        yield (
            f"torch computes the same: relative error {found.outputs:.1e} of outputs,"
            f" {found.gradient_norm:.1e} of the norm of the gradient",
            {"agreement": found._asdict()},
        )
        candidates |= {
            f"torch {way}": reference.make_step(bench, params, way == "compile") for way in ("eager", "compile")
        }
    seconds = interleave(candidates, rounds)
    flops, counted = training_flops(bench.model, SIDE, SIDE), made.program.cost_analysis()["flops"]
    for name, taken in seconds.items():
        median = float(np.median(taken))
        rate = B / median
        hfu = f", HFU {counted * len(jax.devices()) / median / peak:.0%}" if name == "dit_jax" else ""
        yield (
            f"{name}: {median:.3f} s a step, {rate:,.1f} images/s, {rate * flops / 1e12:.3f} model TFLOP/s,"
            f" MFU {rate * flops / peak:.0%}{hfu}",
            {name: {"seconds": taken.tolist(), "images_per_second": rate, "mfu": rate * flops / peak}},
        )
    for name in [name for name in candidates if name != "dit_jax"]:
        compared = ratio(seconds[name], seconds["dit_jax"])
        line = f"ratio to {name}: {compared}"
        # the line that others read is that of the first row
        yield (line if not dropout else f"with dropout, {line}"), {f"ratio to {name}": compared._asdict()}


def stepper(program: jax.stages.Compiled, state: Any, batch: Any) -> Callable[[], dict[str, jax.Array]]:
    """Takes a step when called, waits for it and returns its metrics; the state is used up."""

    def step() -> dict[str, jax.Array]:
        nonlocal state
        state, metrics = program(state, batch)
        return jax.block_until_ready(metrics)

    return step


def measured_peak() -> float:
    """FLOP/s of the fastest float32 product of `ROOF` on this device."""

    def product(shape: tuple[int, int, int]) -> Callable[[], None]:
        n, k, m = shape
        a, b = jnp.ones((n, k)), jnp.ones((k, m))
        multiply = jax.jit(jnp.matmul)
        return lambda: jax.block_until_ready(multiply(a, b))

    seconds = interleave({str(shape): product(shape) for shape in ROOF}, rounds=10)
    return max(2 * np.prod(shape, dtype=float) / seconds[str(shape)].min() for shape in ROOF)
