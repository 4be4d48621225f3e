"""How much memory a train step takes, and what rematerialisation saves of it.

`saved_bytes` counts in the traced program: it says the same for every device and needs none. `compiled_bytes` asks
the compiler about a compiled program: it is what a device really sets aside, and differs from device to device.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Var
from jax.typing import DTypeLike

from dit_jax.models.dit import DiT
from dit_jax.training.state import init_params
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
    params = jax.eval_shape(lambda key: init_params(step.model, key, h, w), jax.random.key(0))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), B))
    places = jax.ShapeDtypeStruct((B,), jnp.float32)
    batch = abstract_batch(step.model, B, h, w, jnp.float32)
    return residual_bytes(step.loss, params, batch, keys, places, jax.random.key(0))


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
