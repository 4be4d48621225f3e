"""The train state: everything that a step changes, and nothing else."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import AbstractMesh, Mesh

from dit_jax.arrays import Array, TextStates
from dit_jax.models.dit import DiT
from dit_jax.sharding import state_shardings, with_sharding
from dit_jax.training.loss_scale import LossScale
from dit_jax.training.skips import Skips


@struct.dataclass
class TrainState:
    """What is saved and resumed.

    Attributes:
      step: int32 scalar, how many steps were done, skipped ones too.
      params: parameters of the DiT, float32.
      ema: their exponential moving average, same structure.
      opt_state: of the optimizer.
      loss_scale: of float16; there under every compute dtype, as ``auto`` is another one on another device.
      skips: how many steps were skipped.
    """

    step: Array
    params: Any
    ema: Any
    opt_state: Any
    loss_scale: LossScale
    skips: Skips


def init_params(model: DiT, key: jax.Array, h: int, w: int) -> Any:
    """Fresh parameters of the model for an ``h x w`` latent grid."""
    S, E, P = model.text_length, model.text_width, model.pooled_width
    text = TextStates(jnp.zeros((1, S, E)), jnp.zeros((1, P)), jnp.ones((1, S), bool))
    x = jnp.zeros((1, h, w, model.in_channels))
    alone = model.clone(mesh=None)  # one picture goes into no mesh; what lies where is for the caller
    return alone.init(key, x, jnp.zeros((1,)), text, train=False)["params"]


@functools.cache
def abstract_params(model: DiT, h: int, w: int) -> Any:
    """Shapes and dtypes of the model's parameters for an ``h x w`` latent grid."""
    return jax.eval_shape(lambda key: init_params(model, key, h, w), jax.random.key(0))


def init_state(
    model: DiT, optimizer: optax.GradientTransformation, key: jax.Array, h: int, w: int, mesh: Mesh
) -> TrainState:
    """A fresh state, made where it shall lie on the mesh by one jitted function."""
    init = functools.partial(_fresh_state, model, optimizer, h, w)
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(model, optimizer, h, w, mesh))
    return jax.jit(init, out_shardings=shardings)(key)


def abstract_state(
    model: DiT, optimizer: optax.GradientTransformation, h: int, w: int, mesh: Mesh | AbstractMesh
) -> TrainState:
    """Shapes, dtypes and shardings of a state, without its arrays: what a checkpoint is restored into.

    Raises:
      ValueError: parameters cannot lie on this mesh.
    """
    shapes = _fresh_state.eval_shape(model, optimizer, h, w, jax.random.key(0))
    return with_sharding(shapes, state_shardings(shapes, shapes.params, mesh))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _fresh_state(model: DiT, optimizer: optax.GradientTransformation, h: int, w: int, key: jax.Array) -> TrainState:
    """Jitted, so that arrays and shapes come from one trace."""
    params = init_params(model, key, h, w)
    ema = jax.tree.map(jnp.copy, params)  # not the same arrays: the step may donate both
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params), LossScale.fresh(), Skips.none())
