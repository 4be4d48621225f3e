"""What a train step moves between its devices, and what that costs: ``bench shard``.

The step is compiled for as many devices as asked for, none of which need be there, and its collectives are counted
(`dit_jax.bench.collectives`). It is compiled for two depths; every block moves alike, so that two say it of all.

From the bytes V of c collectives over n devices follow seconds, by the usual lower bounds (Thakur et al. 2005), with
bandwidth b of a device in one direction and latency a:

    all-gather, reduce-scatter     t = c a log2(n) + (n - 1) / n V / b                                        (1)
    all-reduce                     twice that                                                                 (2)
    over machines of m devices     within machines as above, and between them on V / m with their own b       (3)

Gradients are counted with 4 bytes a number, parameters that are gathered and activations with those of ``dtype``. A
step takes at best the longer of computing and moving, at worst both after one another; computing is at the share of
the peak that is given. These seconds are predicted, not measured.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from dit_jax.bench.collectives import traffic
from dit_jax.bench.presets import SIDE, Bench, make_bench
from dit_jax.models.flops import PEAK_FLOPS, training_flops
from dit_jax.sharding import abstract_mesh, batch_sharding, batch_shards, make_mesh, with_sharding
from dit_jax.training.memory import abstract_batch
from dit_jax.training.state import abstract_state

DEPTHS = (2, 3)  # blocks that are compiled
MFU = 0.4  # of the peak, that computing is assumed to reach
MACHINE = 8  # devices of one, where groups are made
FURTHER = (8, 64, 512, 4096)  # devices, of which only the formulas speak


class Network(NamedTuple):
    """How devices are joined. Figures are the makers', for one direction of one device.

    Attributes:
      device: a key of `dit_jax.models.flops.PEAK_FLOPS`.
      inside: bytes a second within a machine.
      machine: how many devices that is.
      between: bytes a second between machines; None: there are none within reach.
      latency: seconds of a hop.
    """

    device: str
    inside: float
    machine: int
    between: float | None
    latency: float


NETWORKS = {
    "H100, NVLink 4 and InfiniBand NDR": Network("H100", 450e9, 8, 50e9, 5e-6),
    "RTX 4090, PCIe 4 and 100 Gb Ethernet": Network("RTX 4090", 25e9, 8, 12.5e9 / 8, 20e-6),
    "TPU v5e, ICI": Network("TPU v5 lite", 90e9, 256, None, 2e-6),
}


class Moves(NamedTuple):
    """What a step moves, in numbers on a device.

    Attributes:
      gathered: of parameters that are shared along ``fsdp``, where they are used.
      gradients: of these, and of all others.
      tokens: that are summed up along ``tensor``.
      gathers: how many arrays are gathered.
      sums: of tokens.
    """

    gathered: int
    gradients: tuple[int, int]
    tokens: int
    gathers: int
    sums: int


def moves(params: Any, mesh: Mesh | AbstractMesh, L: int, tokens: int) -> Moves:
    """By formula: every kernel of a block is gathered once; four times a block, tokens are summed up (Shoeybi 2019).

    Args:
      params: shapes with their shardings.
      mesh: of the devices.
      L: blocks.
      tokens: B N D of one shard of the batch.
    """
    shared = others = gathers = 0
    for leaf in jax.tree.leaves(params):
        numbers = math.prod(leaf.sharding.shard_shape(leaf.shape))
        if "fsdp" in leaf.sharding.spec and mesh.shape["fsdp"] > 1:
            shared += numbers * mesh.shape["fsdp"]
            gathers += 1
        else:
            others += numbers
    if batch_shards(mesh) == 1:  # all devices have the same pictures
        others = 0
    sums = 4 * L if mesh.shape["tensor"] > 1 else 0
    return Moves(shared, (shared, others), sums * tokens, gathers, sums)


def seconds(moved: Moves, mesh: Mesh | AbstractMesh, itemsize: int, network: Network) -> float:
    """Equations (1) to (3) for all of it."""
    axes = dict(mesh.shape)
    tensor = Group(axes["tensor"], 1)
    fsdp = Group(axes["fsdp"], tensor.size)
    data = Group(axes["data"], tensor.size * fsdp.size)
    both = Group(data.size * fsdp.size, tensor.size)
    shared, others = (4 * numbers for numbers in moved.gradients)
    t = gathering(itemsize * moved.gathered, moved.gathers, fsdp, network)
    t += gathering(shared, moved.gathers, fsdp, network) + 2 * gathering(shared / fsdp.size, 1, data, network)
    t += 2 * gathering(others, 1, both, network)
    return t + 2 * gathering(itemsize * moved.tokens, moved.sums, tensor, network)


class Group(NamedTuple):
    """Devices that move something: how many, and how far one is from the next."""

    size: int
    stride: int


def gathering(V: float, calls: int, group: Group, network: Network) -> float:
    """Seconds of all-gathers of V bytes in all, equations (1) and (3); of reduce-scatters as well."""
    inside = min(group.size, max(1, network.machine // group.stride))
    machines = group.size // inside
    t = calls * network.latency * math.log2(group.size) + (inside - 1) / inside * V / network.inside
    if machines > 1:
        if network.between is None:
            return math.inf
        t += (machines - 1) / machines * V / inside / network.between
    return t if V else 0.0


def strategies(devices: int, heads: int) -> dict[str, tuple[int, int]]:
    """(fsdp, tensor) by name: ways to share a model with so many heads."""
    tensor = math.gcd(heads, MACHINE, devices)
    found = {"data": (1, 1), "fsdp": (devices, 1), f"fsdp {MACHINE}, data": (MACHINE, 1)}
    found[f"tensor {tensor}, data"] = (1, tensor)
    found["fsdp 4, tensor 2, data"] = (4, 2)
    return {name: axes for name, axes in found.items() if devices % math.prod(axes) == 0}


def measure_sharding(preset: str, batch: int, dtype: str, devices: int) -> Iterator[tuple[str, Any]]:
    """Yields lines of a Markdown table, with what they say as data.

    Args:
      preset: of `dit_jax.bench.presets`.
      batch: pictures of a device.
      dtype: of the arithmetic; it changes bytes, not what is compiled: a CPU moves bfloat16 as float32.
      devices: how many; they are made up.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    bench, itemsize = make_bench(preset, batch, "float32", 0.0), jnp.dtype(dtype).itemsize
    flops = batch * training_flops(bench.model, SIDE, SIDE)
    computing = {name: flops / MFU / PEAK_FLOPS[network.device] for name, network in NETWORKS.items()}
    yield f"{preset}, {devices} devices, {batch} pictures each, {dtype}; MiB and milliseconds of a device", None
    yield (
        f"computing at {MFU:.0%} of the peak: " + ", ".join(f"{n} {1e3 * t:.1f}" for n, t in computing.items()),
        computing,
    )
    head = ["strategy", "state", "gathered", "gradients", "tokens", "collectives", "counted / formula"]
    yield "| " + " | ".join([*head, *(f"moving, {name}" for name in NETWORKS)]) + " |", None
    yield "|" + "---|" * (len(head) + len(NETWORKS)), None
    for name, (fsdp, tensor) in strategies(devices, bench.model.num_heads).items():
        mesh = make_mesh(jax.devices()[:devices], fsdp, tensor)
        found = by_strategy(bench, mesh, batch * devices)
        moved: Moves = found["moves"]
        times = {net: seconds(moved, mesh, itemsize, network) for net, network in NETWORKS.items()}
        sizes = found["state"], itemsize * moved.gathered, 4 * sum(moved.gradients), itemsize * moved.tokens
        cells = [
            name,
            *(f"{size / 2**20:,.0f}" for size in sizes),
            ", ".join(f"{count} {kind}" for kind, count in found["calls"].items()),
            f"{found['counted']:.4f}",
            *(f"{1e3 * t:,.1f}" if math.isfinite(t) else "out of reach" for t in times.values()),
        ]
        said = {"strategy": name, "fsdp": fsdp, "tensor": tensor, **found, "moves": moved._asdict(), "seconds": times}
        yield "| " + " | ".join(cells) + " |", said
    yield from further(bench, batch, itemsize, computing)


def further(bench: Bench, batch: int, itemsize: int, computing: dict[str, float]) -> Iterator[tuple[str, Any]]:
    """By the formulas alone, the share of a step that is computing when nothing of both is done at a time."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for devices in FURTHER:
        for name, (fsdp, tensor) in strategies(devices, bench.model.num_heads).items():
            if bench.model.hidden_size % fsdp:
                continue
            mesh = abstract_mesh(fsdp, tensor, devices // (fsdp * tensor))
            moved = formula(bench, mesh, batch * devices)
            found.setdefault(name, {})[devices] = {
                net: computing[net] / (computing[net] + seconds(moved, mesh, itemsize, network))
                for net, network in NETWORKS.items()
            }
    for net in NETWORKS:
        yield f"\n| computing, of a step with {net} | " + " | ".join(f"{n:,} devices" for n in FURTHER) + " |", None
        yield "|" + "---|" * (1 + len(FURTHER)), None
        for name, by_devices in found.items():
            shares = [f"{share:.0%}" if (share := by_devices.get(n, {}).get(net)) else "" for n in FURTHER]
            yield "| " + " | ".join([name, *shares]) + " |", {"strategy": name, "network": net, "shares": shares}


def formula(bench: Bench, mesh: Mesh | AbstractMesh, B: int) -> Moves:
    """What a step on B pictures moves."""
    model = bench.model
    shapes = abstract_state(model, bench.step.optimizer, SIDE, SIDE, mesh)
    N = (SIDE // model.patch_size) ** 2
    return moves(shapes.params, mesh, model.num_layers, B // batch_shards(mesh) * N * model.hidden_size)


def by_strategy(bench: Bench, mesh: Mesh, B: int) -> dict[str, Any]:
    """What a step moves and holds: by formula, and counted in the compiled program of a device."""
    model, optimizer = bench.model, bench.step.optimizer
    shapes, moved = abstract_state(model, optimizer, SIDE, SIDE, mesh), formula(bench, mesh, B)
    calls, numbers = [], []
    for depth in DEPTHS:
        step = dataclasses.replace(bench.step, model=model.clone(num_layers=depth, mesh=mesh))
        state = abstract_state(step.model, optimizer, SIDE, SIDE, mesh)
        batch = with_sharding(abstract_batch(step.model, B, SIDE, SIDE, jnp.float32), batch_sharding(mesh))
        found = traffic(step.compile(state, batch).as_text())
        calls.append({kind: each.calls for kind, each in found.items()})
        numbers.append(sum(each.numbers for each in found.values()))
    first, second = DEPTHS
    more = (model.num_layers - first) / (second - first)
    total = numbers[0] + more * (numbers[1] - numbers[0])
    return {
        "state": sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(shapes)),
        "moves": moved,
        "calls": {kind: round(n + more * (calls[1][kind] - n)) for kind, n in calls[0].items()},
        "counted": total / (moved.gathered + sum(moved.gradients) + moved.tokens),
    }
