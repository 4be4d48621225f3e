"""How fast pictures are drawn: the compiled sampler of `dit_jax.drawing`, from noise to raw latents, on one device.

The guidance scale is 4, and both answers that guidance compares come from one batch of 2 B. A second row leaves
guidance out at the times outside `INTERVAL`, where a step then costs one evaluation in place of two. Text states are
given. Where the packages are there that `dit_jax.encoders` needs, a VAE of the published size decodes the latents.
"""

import copy
import os
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import dit_jax
from dit_jax import build
from dit_jax.arrays import TextStates
from dit_jax.bench import presets
from dit_jax.bench.compiling import empty_cache
from dit_jax.bench.rounds import interleave, ratio
from dit_jax.diffusion import samplers
from dit_jax.drawing.plan import Plan, compile_sampler
from dit_jax.runtime import git_commit
from dit_jax.sharding import make_mesh
from dit_jax.trees import count_parameters

BATCH = {"cpu": 4}  # pictures at once, by backend
ACCELERATOR_BATCH = 64
GUIDANCE_SCALE = 4.0
# of the published VAE (Rombach et al., arXiv:2112.10752): 83.7 M parameters
VAE_CONFIG = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
DECODER = "the VAE's decoder"
ALWAYS, INTERVAL = (0.0, 1.0), (0.2, 0.8)  # times at which a step is guided


class Sampling(NamedTuple):
    """A compiled sampler and what it is called with.

    Attributes:
      draw: raw latents ``[B, h, w, C]`` of all pictures.
      seconds: of tracing and compiling it where nothing is kept.
      evaluations: of the network for one picture.
    """

    draw: Callable[[], jax.Array]
    seconds: float
    evaluations: int


def measure_sampling(
    preset: str, batch: int | None, dtype: str, steps: int, rounds: int, against_torch: bool
) -> Iterator[tuple[str, Any]]:
    """Measure a preset at batch 1 and at another; yields lines to print, each with what it says as data.

    Args:
      preset: of `dit_jax.bench.presets.PRESETS`.
      batch: pictures at once; None is 4 on a CPU and 64 elsewhere.
      dtype: ``float32`` or ``bfloat16``, of the arithmetic.
      steps: of the sampler.
      rounds: how many runs of each candidate count.
      against_torch: whether to run the same loop with PyTorch.
    """
    backend = jax.default_backend()
    batch = batch or BATCH.get(backend, ACCELERATOR_BATCH)
    versions = {name: version(name) for name in ("jax", "flax", *(["torch"] if against_torch else []))}
    said = ", ".join(f"{name} {number}" for name, number in versions.items())
    yield f"dit_jax {dit_jax.__version__} ({git_commit()}), {said}", {"versions": versions}
    kind, cores = jax.devices()[0].device_kind, f", {os.cpu_count()} cores" if backend == "cpu" else ""
    bench = presets.make_bench(preset, batch, dtype, 0.0)
    bench.config.sample.steps = steps
    params = bench.state(make_mesh(jax.devices()[:1])).params
    parameters, computed = count_parameters(params), jnp.dtype(bench.model.dtype).name
    yield (
        f"{preset} on {kind}{cores}: {parameters / 1e6:.1f} M parameters, {computed}, {steps} steps of"
        f" {bench.config.sample.sampler}, guidance scale {GUIDANCE_SCALE:g}",
        {"device": kind, "preset": preset, "parameters": parameters, "dtype": computed, "steps": steps},
    )
    for B in sorted({1, batch}):
        yield from _measure_batch(bench, params, B, rounds, against_torch, f"at batch {B}, " if batch > B else "")


def _measure_batch(
    bench: presets.Bench, params: Any, B: int, rounds: int, against_torch: bool, before: str
) -> Iterator[tuple[str, Any]]:
    """The lines of one batch; ``before`` begins those of the ratios."""
    steps = bench.config.sample.steps
    made = {
        "dit_jax": compile_for(bench, params, B, ALWAYS),
        f"dit_jax, guided from {INTERVAL[1]} to {INTERVAL[0]}": compile_for(bench, params, B, INTERVAL),
    }
    first, *_ = made
    candidates: dict[str, Callable[[], Any]] = {name: run.draw for name, run in made.items()}
    try:
        candidates[DECODER] = decoder(bench, made[first].draw())
    except ImportError as error:
        yield f"{DECODER}: not measured, {error}", {DECODER: str(error)}
    if against_torch:
        from dit_jax.bench import agreement, reference

        start, text = inputs(bench, B)
        ours, on_host = jax.device_get((made[first].draw(), params))
        for way in ("eager", "compile"):
            draw = reference.make_sampler(bench, on_host, start, text, GUIDANCE_SCALE, way)
            try:
                theirs = draw()
            except reference.cannot_compile() as error:
                yield f"torch {way}: {str(error).splitlines()[0]:.80}", {f"torch {way}": str(error)}
                continue
            found = agreement.agree_on_latents(bench, start, ours, reference.channels_last(theirs))
            yield f"torch {way} draws the same: relative error {found:.1e}", {f"agreement {way}": found}
            candidates[f"torch {way}"] = draw
    yield (
        "\n| | batch | evaluations a picture | compiled in s | s a run | s a step | images/s |\n|---"
        + "|---" * 6
        + "|",
        {},
    )
    seconds = interleave({name: waiting(draw) for name, draw in candidates.items()}, rounds)
    for name, taken in seconds.items():
        median, run = float(np.median(taken)), made.get(name)
        decodes = name == DECODER
        evaluations = 0 if decodes else run.evaluations if run else made[first].evaluations
        compiled = f"{run.seconds:.1f}" if run else ""
        a_step = "" if decodes else f"{median / steps:.4f}"
        yield (
            f"| {name} | {B} | {evaluations} | {compiled} | {median:.3f} | {a_step} | {B / median:.2f} |",
            {
                "name": name,
                "batch": B,
                "evaluations": evaluations,
                "compile": run.seconds if run else None,
                "seconds": taken.tolist(),
                "images_per_second": B / median,
            },
        )
    yield "", {}
    if DECODER in seconds:
        share = ratio(seconds[DECODER], seconds[DECODER] + seconds[first])
        yield f"{before}share of {DECODER}: {share}", {f"{before}share of the VAE": share._asdict()}
    for name in [name for name in seconds if name not in (first, DECODER)]:
        # the line that others read is that of the batch that was asked for
        way = f"{before}ratio to {name}"
        compared = ratio(seconds[name], seconds[first])
        yield f"{way}: {compared}", {way: compared._asdict()}


def waiting(draw: Callable[[], Any]) -> Callable[[], None]:
    """The same, until the device is done."""
    return lambda: jax.block_until_ready(draw())


def decoder(bench: presets.Bench, latents: jax.Array) -> Callable[[], jax.Array]:
    """Pictures of raw latents, by a VAE with random parameters in the type in which a pipeline decodes.

    Raises:
      ImportError: for want of what encoders are read with.
    """
    from dit_jax.encoders import VAE
    from dit_jax.encoders.networks import latent_scale, vae_network

    network = vae_network(VAE_CONFIG, dtype=jnp.float32)
    image, key = jnp.zeros((1, 2 * network.factor, 2 * network.factor, 3)), jax.random.key(presets.KEY)
    vae = VAE("random", {}, network, jax.jit(network.init)(key, image, key)["params"], latent_scale(VAE_CONFIG))
    return lambda: vae.decode(latents, build.decoding_dtype(bench.model.dtype))


def inputs(bench: presets.Bench, B: int) -> tuple[jax.Array, TextStates]:
    """Where a run of B pictures starts, and its text."""
    x = samplers.draw_prior(keys(B), (presets.SIDE, presets.SIDE, bench.model.in_channels))
    return x, TextStates(*(bench.batch[name][:B] for name in TextStates._fields))


def keys(B: int) -> jax.Array:
    """Of the pictures."""
    return jax.random.split(jax.random.key(presets.KEY), B)


def compile_for(bench: presets.Bench, params: Any, B: int, interval: tuple[float, float]) -> Sampling:
    """The sampler of B pictures that are guided at the times of an interval."""
    config, process = copy.deepcopy(bench.config), bench.step.process
    config.sample.guidance_interval = interval
    # sides are counted in latents here; what `build` makes of the VAE's scale needs the packages of the encoders
    plan = Plan(presets.SIDE, presets.SIDE, guided=True, first_step=0, masked=False, settings=())
    latents: Any = SimpleNamespace(to_raw=lambda x: x / presets.LATENT_SCALE)
    text = jax.device_put(inputs(bench, B)[1])
    arguments = (params, keys(B), text, None, jnp.float32(GUIDANCE_SCALE), None)
    with empty_cache():
        begin = time.perf_counter()
        program = compile_sampler(plan, config, bench.model, process, latents, 1).lower(*arguments).compile()
        seconds = time.perf_counter() - begin
    times = build.make_grid(config, process)[:-1].tolist()
    guided = sum(interval[0] <= t <= interval[1] for t in times)
    return Sampling(lambda: program(*arguments), seconds, len(times) + guided)
