"""How quick and how large the data of a run are.

Samples per second of the whole loader, as a run has it: order, gathering with padded text, batches, and then also the
way to the devices; and the bytes that a sample takes on disk. Where the config names no cache, it makes one up that has
the sizes of its encoders.
"""

import contextlib
import itertools
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_jax.config import load_config
from dit_jax.errors import ConfigError
from dit_jax.runtime import path_of

if TYPE_CHECKING:
    import jax
    from ml_collections import ConfigDict

    from dit_jax.training.encode import EncodedBatch

RECORDS, PER_SHARD = 20_000, 4096  # of a cache that is made up
THREADS = (1, 2, 4)
DEPTH = 2  # batches on the devices beyond the one in use
WARM_UP = 20  # batches
ROUNDS, SECONDS = 3, 2.0  # of every measurement; the best counts, because other programs can only slow it


def data(spec: str, overrides: dict[str, str]) -> None:
    """Print the bytes of a sample and the speed of the loader, as Markdown tables."""
    import jax

    from dit_jax import build
    from dit_jax.data.ahead import ahead
    from dit_jax.data.cache.files import open_cache, read_manifest
    from dit_jax.data.sources.catalogue import parse
    from dit_jax.feed import gathered_batches, gathered_records
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
        records = gathered_records(config, cache, build.make_order(config, cache, cache.bucket))

        def batches(threads: int) -> "Iterator[EncodedBatch]":
            config.data.workers = threads
            return gathered_batches(config, cache, records, cache.mirrored)(0, sys.maxsize, range(B))

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
