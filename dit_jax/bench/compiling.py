"""How long a train step takes to compile, and how large what the compiler makes of it is."""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

from dit_jax.bench.presets import make_bench
from dit_jax.sharding import make_mesh, put_batch
from dit_jax.training.step import TrainStep


class Compiled(NamedTuple):
    """A compiled step.

    Attributes:
      program: it.
      cold: seconds of tracing and compiling it where nothing is kept.
      warm: the same, as a second process would find it in the persistent cache.
      instructions: of the optimised program, those inside fusions too.
    """

    program: jax.stages.Compiled
    cold: float
    warm: float
    instructions: int


def compile_twice(step: TrainStep, state: Any, batch: Any) -> Compiled:
    """Compile a step into an empty cache, forget it, and find it there again."""
    with empty_cache():
        program, cold = _compile(step, state, batch)
        _, warm = _compile(step, state, batch)
    return Compiled(program, cold, warm, program.as_text().count(" = "))


def measure_compiling(preset: str, batch: int, dtype: str) -> Iterator[tuple[str, Any]]:
    """Yields one line, with what it says as data."""
    bench, mesh = make_bench(preset, batch, dtype, 0.0), make_mesh(jax.devices())
    made = compile_twice(bench.step, bench.state(mesh), put_batch(bench.batch, mesh))
    yield (
        f"{preset}: compiled in {made.cold:.2f} s, from the cache in {made.warm:.2f} s;"
        f" {made.instructions:,} instructions",
        {"compile_cold": made.cold, "compile_warm": made.warm, "instructions": made.instructions},
    )


def _compile(step: TrainStep, state: Any, batch: Any) -> tuple[jax.stages.Compiled, float]:
    jax.clear_caches()
    begin = time.perf_counter()
    program = step.compile(state, batch)
    return program, time.perf_counter() - begin


@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
    """A persistent cache of its own that keeps everything."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [(name, getattr(jax.config, name)) for name in names]
    with tempfile.TemporaryDirectory() as folder:
        for name, value in zip(names, (folder, 0.0), strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # it is opened once otherwise
        try:
            yield
        finally:
            for name, value in before:
                jax.config.update(name, value)
            compilation_cache.reset_cache()
