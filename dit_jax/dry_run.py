"""What a run would be and need, without weights and, with a device named, without data: ``main --dry_run``.

    python -m dit_jax.main --config=configs/small.py --dry_run [--device=4090]

Prints the resolved config, parameters, cost per image and predicted memory. With ``--device`` it says what fits there
and which key to turn; without it, where the data are there, what the compiler sets aside on this machine, how large the
set is, and how many hours the run would take at a measured step. Every memory figure but the compiled one is an
estimate (`dit_jax.training.memory`). Nothing is written to the workdir and nothing is downloaded.
"""

import dataclasses
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from dit_jax import build
from dit_jax.errors import ConfigError, DataError
from dit_jax.files import flatten
from dit_jax.models.dit import REMAT_POLICIES, DiT
from dit_jax.models.flops import DEVICES, GIB, Device, forward_macs, training_flops
from dit_jax.resolve import resolve
from dit_jax.runtime import say
from dit_jax.sharding import abstract_mesh, batch_sharding, batch_shards, with_sharding
from dit_jax.training.memory import Activations, abstract_batch, compiled_bytes, predict_activations
from dit_jax.training.progress import duration
from dit_jax.training.state import TrainState, init_state
from dit_jax.training.step import TrainStep
from dit_jax.trees import named_leaves

if TYPE_CHECKING:
    from dit_jax.encoders import VAEShape

ENCODERS = GIB  # kept free for the frozen encoders: a Stable Diffusion VAE and CLIP-L are 0.8 GiB in float32
MANY = 10**12  # records of a set that is not looked at: no check of lengths must fail because of it
HOPELESS = "at no batch size and with no policy: take a smaller model or a larger device"
STEPS, PATIENCE = 3, 30.0  # a step is measured on so many, or as many as begin within so many seconds


@dataclasses.dataclass(frozen=True)
class Need:
    """Predicted bytes of a training step on one device.

    Attributes:
      state: parameters, gradients, optimizer, moving average, by name.
      activations: beside them.
      accumulate: slices of a batch. Where there are several there are two sets of gradients: the sum, and a slice's.
      shards: devices that share a slice.
    """

    state: dict[str, int]
    activations: Activations
    accumulate: int
    shards: int

    def held(self) -> dict[str, int]:
        """What is there however many images are, by name."""
        copies = {"copies in compute dtype": self.activations.fixed}
        return self.state | {"gradients": self.state["gradients"] * (2 if self.accumulate > 1 else 1)} | copies

    def total(self, images: int) -> int:
        """With so many images at a time: those of one slice of the batch on one device."""
        return sum(self.held().values()) + images * self.activations.per_image

    def largest_batch(self, budget: int) -> int:
        """The largest batch with which every device stays within a budget of bytes; 0 where not even the state does."""
        images = max(0, (budget - self.total(0)) // self.activations.per_image)
        return images * self.accumulate * self.shards

    def fits(self, batch_size: int, budget: int) -> bool:
        """Whether every device is predicted to stay within a budget of bytes."""
        return self.total(batch_size // (self.accumulate * self.shards)) <= budget


class Plan(NamedTuple):
    """A run's step and state, in shapes alone, for square latents of a side."""

    step: TrainStep
    state: TrainState
    side: int


def make_plan(config: ConfigDict, dtype: DTypeLike, vae: "VAEShape", mesh: Mesh | AbstractMesh) -> Plan:
    """The objects of a resolved config that computes in ``dtype``, on devices of which none need be there."""
    side = config.data.image_size // vae.factor
    here = mesh if isinstance(mesh, Mesh) else None
    model, process = build.make_model(config, dtype, here), build.make_process(config)
    optimizer, learning_rate = build.make_optimizer(config)
    state = build.describe_state(config, model, optimizer, side, mesh)
    if not config.latents.scale:  # measured in training; any will do here
        config.latents.shift, config.latents.scale = (0.0,) * vae.channels, (1.0,) * vae.channels
    return Plan(build.make_step(config, model, process, optimizer, learning_rate), state, side)


def predict(config: ConfigDict, plan: Plan) -> Need:
    """The memory of a step; activations of devices that share pictures (mesh.tensor) count as if they did not."""
    step, state, side = plan
    state_bytes = {
        "parameters": size(state.params),
        "gradients": size(state.params),
        f"optimizer ({config.optimizer})": size(state.opt_state),
        "moving average": size(state.ema),
    }
    shards = batch_shards(state.step.sharding.mesh)
    return Need(state_bytes, predict_activations(step, side, side), config.accumulate, shards)


def size(tree: object) -> int:
    """Bytes of all leaves (arrays or their shapes, with shardings) on a device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def report(config: ConfigDict, name: str, device_name: str | None) -> None:
    """Print all of it.

    Args:
      config: as `dit_jax.config.load_config` returns it; its gaps are filled in place.
      name: what the user called it.
      device_name: a key of `DEVICES`, or None for this machine.

    Raises:
      ConfigError: a device that is not known, or values that cannot be, as in training.
    """
    # ---- the objects and checks of training that need shapes alone
    if device_name is not None and device_name not in DEVICES:
        raise ConfigError(f"--device is {device_name!r}; it can be {', '.join(DEVICES)}")
    device = DEVICES[device_name] if device_name else None
    devices = jax.devices()
    # of a device that is not here there are as many as share the parameters
    mesh = abstract_mesh(config.mesh.fsdp or 1, config.mesh.tensor) if device else build.make_mesh(config, devices)
    records, missing = (None, "") if device else look_at_data(config)
    vae, text = build.describe_encoders(config)
    by_epochs = records is None and not config.total_steps  # then how many steps there are is for the data to say
    notes = resolve(config, MANY if records is None else records, vae, text, batch_shards(mesh))
    chosen = device.dtype if device and config.dtype == "auto" else config.dtype
    dtype = build.compute_dtype(chosen, devices[0])
    plan = make_plan(config, dtype, vae, mesh)
    step, state, side = plan
    build.make_times(config, step.process)
    build.make_sampler(config, step.process, build.make_grid(config, step.process))
    if by_epochs:
        config.total_steps = 0
        notes.append("total_steps is 0 here: it follows from total_epochs and the number of pictures")
    need = predict(config, plan)

    # ---- what can be said of every run
    say(f"dry run of {name}: nothing is trained, downloaded or written to a workdir")
    section("config")
    for key, value in flatten(config).items():
        say(f"  {key} = {value!r}")
    for note in notes:
        say(f"warning: {note}")
    say_model(config, step.model, state, side)
    where = device.kind if device else f"a device of this machine ({mesh.size} x {devices[0].device_kind})"
    section(f"predicted memory of {where}: an estimate, in GiB")
    say(f"  compute in {np.dtype(dtype).name}, model.remat={config.model.remat}, accumulate={config.accumulate}")
    images = config.batch_size // (config.accumulate * need.shards)
    say_memory(config, need, images)

    # ---- what fits there, or what this machine says
    if device:
        number = "one" if mesh.size == 1 else f"each of {mesh.size}"
        section(f"does it fit on {number} {device.kind} of {device.memory / GIB:.0f} GiB?")
        say_fit(config, plan, device)
        return
    section("data and time on this machine")
    if records is None:
        say(f"  not said: compiled memory, size of the set, hours; {missing}")
        say(f"  what fits on a card: --device={'|'.join(DEVICES)}")
        return
    say(f"  {config.data.source}: {records:,} pictures; an epoch is {records / config.batch_size:,.1f} steps")
    if config.validate_every:
        held_out = len(build.make_validation_source(config))
        say(f"  {held_out:,} others are set aside and validate every {config.validate_every:,} steps")
    say_measured(config, plan, need.total(images))


def look_at_data(config: ConfigDict) -> tuple[int | None, str]:
    """How many pictures there are; or None, and why that is not known. Reads captions, no picture."""
    if not config.data.source:
        return None, "data.source is not set (--config.data.source=folder:PATH)"
    try:
        return len(build.make_source(config, "train")), ""
    except DataError as error:
        return None, str(error)


def say_model(config: ConfigDict, model: DiT, state: TrainState, side: int) -> None:
    """Parameters, latents and cost per image."""
    parts = {"blocks": 0, "embedders": 0, "final layer": 0}
    for leaf, shape in named_leaves(state.params).items():
        part = "blocks" if leaf.startswith("blocks_") else "final layer" if leaf.startswith("final") else "embedders"
        parts[part] += shape.size
    macs = forward_macs(model, side, side)
    section("model")
    split = ", ".join(f"{part} {count:,}" for part, count in parts.items())
    say(f"  parameters      {sum(parts.values()):,} ({split})")
    tokens = (side // model.patch_size) ** 2
    say(
        f"  pictures        {config.data.image_size} px -> latents {side}x{side}x{model.in_channels} -> {tokens} tokens"
    )
    say(f"  text            {model.text_mode}, {model.text_length} tokens of width {model.text_width}")
    flops = training_flops(model, side, side)
    say(f"  FLOP per image  {2 * macs / 1e9:.3g} G forward, {flops / 1e9:.3g} G in training (forward and backward)")
    say(f'                  published "Gflops" of DiT are multiply-adds: {macs / 1e9:.3g} G forward')


def say_memory(config: ConfigDict, need: Need, images: int) -> None:
    """The table of what is held, at one image and at the config's batch."""
    counts = (1, images)
    say(f"  {'batch':28} {1:>9} {config.batch_size:>9}")
    if images != config.batch_size:
        say(f"  {'images at a time, a device':28} {1:>9} {images:>9}")
    table = {part: (held, held) for part, held in need.held().items()}
    table["activations"] = (need.activations.per_image, images * need.activations.per_image)
    table["total"] = (need.total(counts[0]), need.total(counts[1]))
    for part, (one, all_of_it) in table.items():
        say(f"  {part:28} {one / GIB:9.3f} {all_of_it / GIB:9.3f}")
    say(f"  not in it: frozen encoders (up to {ENCODERS / GIB:.0f} GiB), and what drawing samples needs between steps")


def say_fit(config: ConfigDict, plan: Plan, device: Device) -> None:
    """Whether the config's batch fits on the device, the largest that does, and the keys that help."""
    budget = int(device.memory * device.usable) - ENCODERS
    taken = "" if device.usable == 1 else f"of which JAX takes {device.usable:.0%}, "
    memory = f"{device.memory / GIB:.0f} GiB, {taken}less {ENCODERS / GIB:.0f} for the encoders"
    say(f"  {memory}: {budget / GIB:.2f} GiB for a step")
    if taken:
        say("  (XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 in the environment lets JAX take 90%; not counted here)")
    needs = by_policy(config, plan)
    for remat, other in needs.items():
        most = other.largest_batch(budget)
        now = "  <- the config's" if remat == config.model.remat else ""
        say(f"  largest batch with model.remat={remat:5} {most:>8,}{now}")
    if needs[config.model.remat].fits(config.batch_size, budget):
        say(f"  fits: batch_size={config.batch_size}")
        return
    half = predict_with(config, plan, dtype=jnp.bfloat16) if config.dtype == "float32" else None
    found = [as_flags(changes) for changes in remedies(config, needs, half, budget)]
    if not found:
        say(f"  does NOT fit, {HOPELESS}")
        return
    say(f"  does NOT fit: batch_size={config.batch_size}. By the same estimate each line alone mends it:")
    for flags in found:
        say(f"    {flags}")


def advice(config: ConfigDict) -> str:
    """What a run can do whose memory was not enough on the devices that are here: flags, each of which alone mends it.

    By the estimate, which a run that did not fit has shown to be too low or too high for this device: what is advised
    needs less than the device has, and less than the run.

    Args:
      config: of the run; resolved.
    """
    vae, _ = build.describe_encoders(config)
    devices = jax.devices()
    plan = make_plan(config, build.compute_dtype(config.dtype, devices[0]), vae, build.make_mesh(config, devices))
    needs = by_policy(config, plan)
    now = needs[config.model.remat]
    needed = now.total(config.batch_size // (config.accumulate * now.shards))
    stats = devices[0].memory_stats() or {}
    budget = min(needed - 1, stats.get("bytes_limit", needed + ENCODERS) - ENCODERS)
    found = [as_flags(changes) for changes in remedies(config, needs, None, budget)]
    if not found:
        return f"by the estimate of --dry_run it fits {HOPELESS}"
    return f"by the estimate of --dry_run each of these alone mends it: {', or '.join(found)}"


def by_policy(config: ConfigDict, plan: Plan) -> dict[str, Need]:
    """What a run would need with each policy of remat."""
    return {remat: predict_with(config, plan, remat=remat) for remat in REMAT_POLICIES}


def predict_with(config: ConfigDict, plan: Plan, **changes: Any) -> Need:
    """What a run would need with another model."""
    step = dataclasses.replace(plan.step, model=plan.step.model.clone(**changes))
    return predict(config, plan._replace(step=step))


def as_flags(changes: dict[str, int | str]) -> str:
    """Changes of keys as a command line has them."""
    return " ".join(f"--config.{key}={value}" for key, value in changes.items())


def remedies(
    config: ConfigDict, needs: dict[str, Need], half: Need | None, budget: int
) -> Iterator[dict[str, int | str]]:
    """Changes of keys with which the config fits; each was checked by the prediction.

    For each policy of remat the fewest slices that fit, then a smaller batch, and arithmetic in 16 bits. ``needs`` are
    by policy; ``half`` is that in 16 bits, where the config asks for 32.
    """
    B = config.batch_size
    of_shard = B // needs[config.model.remat].shards
    slices = [a for a in range(1, of_shard + 1) if of_shard % a == 0]
    policies = list(REMAT_POLICIES)
    for remat in policies[policies.index(config.model.remat) :]:
        for accumulate in slices:
            if dataclasses.replace(needs[remat], accumulate=accumulate).fits(B, budget):
                new: dict[str, int | str] = {"model.remat": remat, "accumulate": accumulate}
                old = flatten(config)
                yield {key: value for key, value in new.items() if value != old[key]}
                break
    if most := needs[config.model.remat].largest_batch(budget):
        yield {"batch_size": most}
    if half is not None and half.fits(B, budget):
        yield {"dtype": "auto"}


def say_measured(config: ConfigDict, plan: Plan, predicted: int) -> None:
    """Compile the real step for these shapes; take a few on zeros where they fit; say bytes and hours.

    ``predicted`` is the estimate of a device's bytes.
    """
    step, state, side = plan
    mesh = state.step.sharding.mesh
    batch = abstract_batch(step.model, config.batch_size, side, side, config.data.storage_dtype)
    batch = with_sharding(batch, batch_sharding(mesh))
    say("  compiling the train step ...")
    begin = time.monotonic()
    compiled = step.compile(state, batch)
    parts = compiled_bytes(compiled)
    say(
        f"  compiled memory {parts['total'] / GIB:.3f} GiB a device, of it {parts['temporaries'] / GIB:.3f} for"
        f" activations and gradients (compiled in {time.monotonic() - begin:.0f} s); the estimate is"
        f" {predicted / parts['total'] - 1:+.0%} off"
    )
    room = free_memory()
    needed = parts["total"] * (len(jax.devices()) if jax.default_backend() == "cpu" else 1)
    if room is not None and needed > room:
        say(f"  time not measured: a step needs {needed / GIB:.1f} GiB, this machine has {room / GIB:.1f} GiB free")
        return
    values = jax.tree.map(lambda a: jax.device_put(np.zeros(a.shape, a.dtype), a.sharding), batch)
    held = init_state(step.model, step.optimizer, jax.random.key(0), side, side, mesh)
    held, metrics = compiled(held, values)  # the first step is slower than the others
    jax.block_until_ready(metrics)
    begin = time.monotonic()
    taken = 0
    while taken < STEPS and time.monotonic() - begin < PATIENCE:
        held, metrics = compiled(held, values)
        jax.block_until_ready(metrics)
        taken += 1
    seconds = (time.monotonic() - begin) / taken
    say(
        f"  {seconds:.3f} s a step, {config.batch_size / seconds:,.0f} pictures/s (mean of {taken} on zeros):"
        f" {config.total_steps:,} steps take {duration(config.total_steps * seconds)}, without encoding and drawing"
    )


def free_memory() -> int | None:
    """Bytes that a step may take here: what JAX has on the first device, or on CPU the free memory of the machine."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    meminfo = Path("/proc/meminfo")  # of Linux; what it calls available counts what the page cache would give back
    available = re.search(r"^MemAvailable: *(\d+) kB", meminfo.read_text(), re.MULTILINE) if meminfo.is_file() else None
    return int(available[1]) * 1024 if available else None


def section(title: str) -> None:
    """A heading."""
    print(f"\n{title}", flush=True)
