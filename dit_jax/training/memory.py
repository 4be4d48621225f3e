"""How much memory a train step takes, and what rematerialisation saves of it.

`saved_bytes` counts in the traced program: it says the same for every device and needs none. `compiled_bytes` asks
the compiler about a compiled program: it is what a device really sets aside, and differs from device to device.
`predict_activations` is an estimate of that, without a device.

Seen (jax 0.10.2): of the total that XLA for CPU sets aside for the small model in float32, at batches of 2 and 8 and
for every policy of remat, the estimate was 0.92 to 1.17. XLA for CPU computes bfloat16 in float32 and takes more than
the estimate. No GPU was seen yet.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Var
from jax.typing import DTypeLike

from dit_jax.models.dit import DiT
from dit_jax.training.state import abstract_params
from dit_jax.training.step import Batch, TrainStep


def abstract_batch(model: DiT, B: int, h: int, w: int, dtype: DTypeLike) -> Batch:
    """Shapes and dtypes of an encoded batch of B samples for an ``h x w`` latent grid; ``dtype`` is the moments'."""
    S, E, P = model.text_length, model.text_width, model.pooled_width
    moments = jax.ShapeDtypeStruct((B, h, w, model.in_channels), dtype)
    return {
        "mean": moments,
        "std": moments,
        "hidden": jax.ShapeDtypeStruct((B, S, E), jnp.bfloat16),
        "pooled": jax.ShapeDtypeStruct((B, P), jnp.bfloat16),
        "mask": jax.ShapeDtypeStruct((B, S), jnp.bool_),
    }


def saved_bytes(step: TrainStep, B: int, h: int, w: int) -> int:
    """Bytes that a step keeps from its forward to its backward pass for a batch of B on an ``h x w`` latent grid.

    The parameters and the batch are there anyway and do not count. With ``accumulate`` A, B is a slice of the batch. A
    compiler may keep less, where computing a value again is cheaper than reading it.
    """
    step = dataclasses.replace(step, model=step.model.clone(mesh=None))  # B need not go into its devices
    params = abstract_params(step.model.clone(remat="none"), h, w)  # the same for all policies, and so looked at once
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), B))
    places = jax.ShapeDtypeStruct((B,), jnp.float32)
    batch = abstract_batch(step.model, B, h, w, jnp.float32)
    return residual_bytes(step.loss, params, batch, keys, places, jax.random.key(0))


class Activations(NamedTuple):
    """Predicted bytes of a train step beside its state.

    Attributes:
      fixed: however large the batch is: parameters in the compute dtype.
      per_image: for every image of a slice.
    """

    fixed: int
    per_image: int


def predict_activations(step: TrainStep, h: int, w: int) -> Activations:
    """What a step keeps from its forward to its backward pass, and room to work in, on an ``h x w`` latent grid.

    The room is two of its largest arrays, and unless remat is ``none`` what one block keeps under ``none``, which is
    computed again.
    """
    model = step.model
    kept, _ = kept_bytes(step, h, w)
    N = (h // model.patch_size) * (w // model.patch_size) + model.num_registers
    if model.text_mode == "joint":
        N += model.text_length
    c = jnp.dtype(model.dtype).itemsize
    room = 2 * N * max(4 * model.num_heads * N, c * model.spec.mlp_width)
    again = 0
    if model.remat != "none":
        _, block = kept_bytes(dataclasses.replace(step, model=model.clone(remat="none")), h, w)
        again = block.per_image
    return Activations(kept.fixed, kept.per_image + room + again)


@functools.cache
def kept_bytes(step: TrainStep, h: int, w: int) -> tuple[Activations, Activations]:
    """What a step keeps between its passes: in all, and for one more block.

    All blocks but the last keep alike, and all images: two small models with two small batches say it of all.
    """

    def count(num_layers: int) -> np.ndarray:
        small = dataclasses.replace(step, model=step.model.clone(num_layers=num_layers))
        two, three = (saved_bytes(small, B, h, w) for B in (2, 3))
        return np.array([3 * two - 2 * three, three - two])

    first = count(2)
    block = count(3) - first
    everything = first + (step.model.num_layers - 2) * block
    return Activations(*everything.tolist()), Activations(*block.tolist())


def residual_bytes(function: Callable[..., Any], *args: Any) -> int:
    """Bytes that the gradient of ``function`` by its first argument keeps between the passes, beyond the arguments.

    Arguments are arrays or their shapes.
    """

    def forward(first, *others):
        return jax.vjp(lambda first: function(first, *others), first)[1]

    jaxpr = jax.make_jaxpr(forward)(*args).jaxpr
    kept = {v for v in jaxpr.outvars if isinstance(v, Var)} - {*jaxpr.invars, *jaxpr.constvars}
    return sum(v.aval.size * v.aval.dtype.itemsize for v in kept)


def compiled_bytes(compiled: jax.stages.Compiled) -> dict[str, int]:
    """What a compiled program sets aside on each device: its arguments, its temporaries, and all together.

    A result that takes the place of a donated argument counts once.
    """
    found = compiled.memory_analysis()
    arguments, temporaries = found.argument_size_in_bytes, found.temp_size_in_bytes
    total = arguments + temporaries + found.output_size_in_bytes - found.alias_size_in_bytes
    return {"arguments": arguments, "temporaries": temporaries, "total": total}
