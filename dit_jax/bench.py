"""Measures what a model takes, and what samplers give.

    python -m dit_jax.bench memory --config=configs/small.py [--config.key=value ...]
    python -m dit_jax.bench data   --config=configs/small.py [--config.data.source=cache:FOLDER]
    python -m dit_jax.bench sampling --config=configs/small.py [--config.sample.grid=trailing]

``memory``: for every ``model.remat``, what the backward pass keeps of the forward one, and what the compiled train step
sets aside on each device; with the batch size, picture size and dtype of the config. It needs neither data nor the
weights of the encoders.

``data``: samples per second of the whole loader, as a run has it: order, gathering with padded text, batches, and then
also the way to the devices; and the bytes that a sample takes on disk. Where the config names no cache, it makes one
up that has the sizes of its encoders.

``sampling``: how far every sampler is from the truth for so many evaluations of the network, with a mixture of
Gaussians in place of data and its exact denoiser in place of the network, on the schedule and grid of the config.
"""

import argparse
import contextlib
import itertools
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_jax.config import load_config
from dit_jax.errors import ConfigError
from dit_jax.runtime import add_flags, path_of, read_overrides, run_program, set_up

if TYPE_CHECKING:
    import jax
    from ml_collections import ConfigDict

    from dit_jax.training.encode import EncodedBatch

MIB = 2**20

RECORDS, PER_SHARD = 20_000, 4096  # of a cache that is made up
THREADS = (1, 2, 4)
DEPTH = 2  # batches on the devices beyond the one in use
WARM_UP = 20  # batches
EVALUATIONS = (5, 8, 10, 15, 20, 30, 50)
DRAWS = (1024, (4, 4, 1))  # images of a sampler, and the shape of each: every element is a draw of its own
EXACT = 1000  # steps of Heun's method whose end counts as exact
ROUNDS, SECONDS = 3, 2.0  # of every measurement; the best counts, because other programs can only slow it


def memory(spec: str, overrides: dict[str, str]) -> None:
    """Print a row per remat policy, in MiB, as a Markdown table."""
    import jax
    import numpy as np

    from dit_jax import build
    from dit_jax.models.dit import REMAT_POLICIES
    from dit_jax.resolve import resolve
    from dit_jax.sharding import batch_sharding, make_mesh, with_sharding
    from dit_jax.training.memory import abstract_batch, compiled_bytes, saved_bytes
    from dit_jax.training.state import abstract_state

    config = load_config(spec, overrides)
    mesh = make_mesh(jax.devices())
    vae, text_encoder = build.describe_encoders(config)
    resolve(config, config.batch_size, vae, text_encoder, mesh.size)
    config.latents.shift = config.latents.scale = (1.0,) * config.model.in_channels  # any: they change no shape
    side = config.data.image_size // vae.factor
    B, dtype = config.batch_size, build.compute_dtype(config.dtype, jax.devices()[0])
    steps = {}
    for remat in REMAT_POLICIES:
        config.model.remat = remat
        model, process = build.make_model(config, dtype), build.make_process(config)
        steps[remat] = build.make_step(config, model, process, *build.make_optimizer(config))
    print(
        f"batch {B} on {mesh.size} x {jax.devices()[0].device_kind}, accumulate {config.accumulate},"
        f" {np.dtype(dtype).name}, MiB a device"
    )
    print("| remat | kept for the backward pass | temporaries of the compiled step | the step in all |")
    print("|---|---|---|---|", flush=True)
    for remat, step in steps.items():
        kept = saved_bytes(step, B // config.accumulate // mesh.size, side, side)
        state = abstract_state(step.model, step.optimizer, side, side, mesh)
        batch = abstract_batch(step.model, B, side, side, config.data.storage_dtype)
        batch = with_sharding(batch, batch_sharding(mesh))
        found = compiled_bytes(step.compile(state, batch))
        row = [kept, found["temporaries"], found["total"]]
        print(f"| {remat} | " + " | ".join(f"{n / MIB:,.0f}" for n in row) + " |", flush=True)


def data(spec: str, overrides: dict[str, str]) -> None:
    """Print the bytes of a sample and the speed of the loader, as Markdown tables."""
    import jax

    from dit_jax import build
    from dit_jax.data.ahead import ahead
    from dit_jax.data.cache.files import open_cache, read_manifest
    from dit_jax.data.sources.catalogue import parse
    from dit_jax.feed import gathered_batches
    from dit_jax.sharding import make_mesh, put_batch

    config = load_config(spec, overrides)
    mesh, B = make_mesh(jax.devices()), config.batch_size
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parts = parse(config.data.source) if config.data.source else []
        named = [part for part in parts if part.kind == "cache"]
        if len(named) > 1:
            raise ConfigError(f"data.source is {config.data.source!r}: one cache is measured at a time")
        if named:
            folder = path_of(named[0].place)
        else:
            print(f"data.source names no cache: {RECORDS:,} records are made up", flush=True)
            _make_up(folder, config)
        cache, manifest = open_cache(folder), read_manifest(folder)
        _print_sizes(manifest)
        order = build.make_order(config, cache, cache.bucket)

        def batches(threads: int) -> "Iterator[EncodedBatch]":
            config.data.workers = threads
            return gathered_batches(config, cache, order, cache.mirrored)(0, sys.maxsize)

        def on_devices(threads: int) -> "Iterator[dict[str, jax.Array]]":
            coming = (jax.block_until_ready(put_batch(batch, mesh)) for batch in batches(threads))
            return ahead(coming, DEPTH, 0, "")

        for batch in itertools.islice(batches(1), -(-len(cache) // B)):  # all files are in memory, if it holds them
            S = batch["hidden"].shape[1]
        print(f"\nsamples/s of batches of {B}, text padded to {S} tokens; the best of {ROUNDS} x {SECONDS:g} s")
        print(f"| threads | in the host's memory | on {mesh.size} x {jax.devices()[0].device_kind} |")
        print("|---|---|---|", flush=True)
        best: dict[tuple[int, int], float] = {}
        for _, threads, (i, way) in itertools.product(range(ROUNDS), THREADS, enumerate((batches, on_devices))):
            best[threads, i] = max(best.get((threads, i), 0.0), B * _per_second(way(threads)))
        for threads in THREADS:
            print(f"| {threads} | {best[threads, 0]:,.0f} | {best[threads, 1]:,.0f} |", flush=True)


def _make_up(folder: Path, config: "ConfigDict") -> None:
    """A cache like one that the config's encoders would fill."""
    from dit_jax import build
    from dit_jax.data.cache.files import FORMAT
    from dit_jax.data.cache.made_up import make_up

    vae, text = build.describe_encoders(config)
    making = {
        "format": FORMAT,
        "image_size": config.data.image_size,
        "crop": config.data.crop,
        "mirrored": False,
        "buckets": [[config.data.image_size] * 2],
        "vae": {"name": config.vae, "sha256": "", "shift": [], "scale": [], **vae._asdict()},
        "text_encoder": {"name": config.text_encoder, "sha256": "", **text._asdict()},
        "storage_dtype": config.data.storage_dtype,
        "records_per_shard": PER_SHARD,
        "captions_per_shard": PER_SHARD,
    }
    make_up(folder, RECORDS, making)


def _print_sizes(manifest: dict[str, Any]) -> None:
    """How many bytes a sample takes, and would take with the text of every token."""
    records, text = sum(manifest["data"]["records"]), manifest["text_encoder"]
    size: dict[str, float] = {}
    for name, known in manifest["shards"].items():
        kind = re.split(r"\W", name)[0]
        size[kind] = size.get(kind, 0) + known["bytes"] / records
    tokens = manifest["tokens"]["all"] / manifest["data"]["captions"]
    print(f"{records:,} records, {tokens:.1f} tokens a caption, of {text['length']} x {text['width']} with padding")
    print("| | bytes a sample | with padded bfloat16 text | with padded float32 text |")
    print("|---|---|---|---|")
    for what, kinds in (("text", ("texts",)), ("all", size)):
        taken = sum(size[kind] for kind in kinds)
        padded = [taken - size["texts"] + text["length"] * text["width"] * itemsize for itemsize in (2, 4)]
        print(
            f"| {what} | {taken:,.0f} | " + " | ".join(f"{n:,.0f}: {n / taken:.1f} x" for n in padded) + " |",
            flush=True,
        )


def _per_second(stream: Any) -> float:
    """Items of an endless stream per second, the first ones left out."""
    with contextlib.closing(stream):
        for _ in range(WARM_UP):
            next(stream)
        count, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < SECONDS:
            next(stream)
            count += 1
        return count / (time.perf_counter() - begin)


def sampling(spec: str, overrides: dict[str, str]) -> None:
    """Print the errors of all samplers on a mixture of Gaussians, as two Markdown tables."""
    import dataclasses

    import jax
    import numpy as np

    from dit_jax import build
    from dit_jax.diffusion import mixture, samplers

    config = load_config(spec, overrides)
    process = dataclasses.replace(build.make_process(config), prediction="v")  # the denoiser is exact: any would do
    denoise = mixture.make_denoise(process)
    count, shape = DRAWS
    keys = jax.random.split(jax.random.key(config.seed), count)

    def draw(name: str, steps: int) -> np.ndarray:
        config.sample.sampler, config.sample.steps = name, steps
        grid = build.make_grid(config, process)
        sampler = build.make_sampler(config, process, grid)

        def run(keys: jax.Array) -> jax.Array:
            return samplers.run(sampler, keys, samplers.draw_prior(keys, shape), grid, [(0, steps, denoise)])

        return np.asarray(jax.jit(run)(keys), np.float64).ravel()

    exact = draw("heun", EXACT)
    truth = mixture.quantiles((np.arange(exact.size) + 0.5) / exact.size)
    random = np.random.default_rng(0).uniform(size=exact.size)
    floor = np.abs(np.sort(mixture.quantiles(random)) - truth).mean()
    grid = f"schedule {config.diffusion.schedule}, grid {config.sample.grid}"
    found = {
        (name, n): draw(name, n // evaluations)
        for name, evaluations in (("euler", 1), ("dpmpp_2m", 1), ("heun", 2), ("ddpm", 1))
        for n in EVALUATIONS
    }
    header = "| sampler | " + " | ".join(map(str, EVALUATIONS)) + " |\n|---|" + "---|" * len(EVALUATIONS)
    print(f"root mean square distance from the exact solution, by evaluations; {grid}\n{header}")
    for name in ("euler", "dpmpp_2m", "heun"):
        errors = [np.sqrt(np.mean((found[name, n] - exact) ** 2)) for n in EVALUATIONS]
        print(f"| {name} | " + " | ".join(f"{error:.4f}" for error in errors) + " |")
    print(
        f"\nWasserstein distance of {exact.size:,} draws from the mixture, by evaluations; {grid};"
        f" as many true draws have {floor:.4f}\n{header}"
    )
    for name in ("euler", "dpmpp_2m", "heun", "ddpm"):
        errors = [np.abs(np.sort(found[name, n]) - truth).mean() for n in EVALUATIONS]
        print(f"| {name} | " + " | ".join(f"{error:.4f}" for error in errors) + " |", flush=True)


MEASURES = {"memory": memory, "data": data, "sampling": sampling}


def main(argv: Sequence[str] | None = None) -> None:
    """The program's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m dit_jax.bench", description="Measure what a model takes.", allow_abbrev=False
    )
    parser.add_argument(
        "what",
        choices=MEASURES,
        help="memory: of the train step, by model.remat | data: speed, size of a cache | sampling: error of samplers",
    )
    parser.add_argument("--config", required=True, help="FILE.py, FILE.py:key=value,key=value or a run's config.json")
    add_flags(parser)
    args, rest = parser.parse_known_args(argv)
    overrides = read_overrides(parser, rest)

    def measure() -> None:
        set_up(args.allow_cpu, args.verbose)
        MEASURES[args.what](args.config, overrides)

    run_program(measure, args.traceback, "lower batch_size")


if __name__ == "__main__":
    main(sys.argv[1:])
