"""Trains the embedded VAE, a small KL autoencoder that shrinks pictures 8 times to 4 channels.

    loss = |y - x| + SQUARES_WEIGHT (y - x)^2 + |grad y - grad x| / 2 + KL_WEIGHT KL(q(z|x) || N(0, 1))   (1)
    KL   = (mean^2 + std^2 - 1) / 2 - log std                                                       (2)

Each term is a mean over its own elements; y is decoded from a sample z of the posterior, and grad is the
difference of neighbouring pixels, which keeps edges sharp. (2) is equation (10) of Kingma & Welling,
"Auto-Encoding Variational Bayes" (arXiv:1312.6114). Its weight leaves so much noise in z that the decoder
forgives the small errors of a diffusion model, and so little that the shapes of a picture survive.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file

from dit_jax.data.shapes_world import IMAGE_SIZE
from dit_jax.encoders.networks import vae_network
from dit_jax.encoders.weights import VAE_PREFIX, to_published
from dit_jax.sharding import make_mesh, put_batch, replicated
from dit_jax.training.encode import to_signed

from .pictures import FOLDER_SIZE, random_cut, recolour

CONFIG = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [16, 32, 48, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "out_channels": 3,
    "sample_size": 64,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
BATCH = 8  # of shapes, and of real pictures
PEAK_LEARNING_RATE = 2e-3
WARMUP_STEPS = 200
SHAPES_WEIGHT = 4  # of the loss on shapes: little of such a picture is hard, and all of that matters
SQUARES_WEIGHT = 4
KL_WEIGHT = 3e-4
EMA_DECAY = 0.998
LOG_EVERY = 100
SAVE_EVERY = 800

Params = Any
Batch = dict[str, np.ndarray]


def batches(rng: np.random.Generator, shapes: np.ndarray, real: np.ndarray, steps: int) -> Iterator[Batch]:
    """Pictures in [-1, 1], as many shapes as real pictures, those in random cuts and colours."""
    for _ in range(steps):
        drawn = shapes[rng.integers(len(shapes), size=BATCH)]
        chosen = real[rng.integers(len(real), size=BATCH)]
        cuts = [recolour(rng, random_cut(rng, image, _side(rng))) for image in chosen]
        yield {"shapes": to_signed(drawn), "real": to_signed(np.stack(cuts))}


def _side(rng: np.random.Generator) -> int:
    """Half of the cuts are not scaled: they show a real picture at the scale of the folder."""
    return IMAGE_SIZE if rng.random() < 0.5 else int(rng.integers(IMAGE_SIZE, FOLDER_SIZE + 1))


def reconstruction_loss(network: Any, params: Params, images: jax.Array, key: jax.Array) -> jax.Array:
    """Equation (1) for pictures of one size."""
    y, mean, std = network.apply({"params": params}, images, key)
    error = y - images
    edges = jnp.abs(jnp.diff(error, axis=1)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean()
    kl = ((mean**2 + std**2 - 1) / 2 - jnp.log(std)).mean()  # equation (2)
    return jnp.abs(error).mean() + SQUARES_WEIGHT * (error**2).mean() + edges / 2 + KL_WEIGHT * kl


def train(shapes: np.ndarray, real: np.ndarray, steps: int, seed: int, output: Path) -> None:
    """Trains for `steps` steps and writes the averaged weights every SAVE_EVERY steps and at the end.

    Args:
      shapes: uint8 `[n, 64, 64, 3]`.
      real: uint8 `[m, 128, 128, 3]`.
      output: folder of the VAE.
    """
    network = vae_network(CONFIG, dtype=jnp.float32)
    schedule = optax.warmup_cosine_decay_schedule(0, PEAK_LEARNING_RATE, WARMUP_STEPS, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))
    init_key, noise_key = jax.random.split(jax.random.key(seed))
    params = network.init(init_key, jnp.zeros((1, 64, 64, 3)), noise_key)["params"]
    mesh = make_mesh(jax.devices())
    params, ema, opt_state = jax.device_put((params, params, optimizer.init(params)), replicated(mesh))

    @jax.jit
    def update(params: Params, ema: Params, opt_state: Any, batch: Batch, step: jax.Array) -> tuple:
        shapes_key, real_key = jax.random.split(jax.random.fold_in(noise_key, step))

        def loss(params: Params) -> jax.Array:
            of_shapes = reconstruction_loss(network, params, batch["shapes"], shapes_key)
            of_real = reconstruction_loss(network, params, batch["real"], real_key)
            return (SHAPES_WEIGHT * of_shapes + of_real) / (SHAPES_WEIGHT + 1)

        value, gradients = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradients, opt_state)
        params = optax.apply_updates(params, updates)
        return params, optax.incremental_update(params, ema, 1 - EMA_DECAY), opt_state, value

    rng = np.random.default_rng(seed)
    start, losses = time.monotonic(), []
    for step, batch in enumerate(batches(rng, shapes, real, steps)):
        params, ema, opt_state, value = update(params, ema, opt_state, put_batch(batch, mesh), step)
        losses.append(float(value))
        if (step + 1) % LOG_EVERY == 0:
            recent, seconds = np.mean(losses[-LOG_EVERY:]), time.monotonic() - start
            print(f"vae step={step + 1}/{steps} loss={recent:.4f} seconds={seconds:.0f}", flush=True)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            write(network, jax.device_get(ema), shapes, real, output)


def write(network: Any, params: Params, shapes: np.ndarray, real: np.ndarray, output: Path) -> None:
    """Writes the published layout in float16, with the scaling that gives the channels of the latents unit variance."""
    encode = jax.jit(lambda images: network.apply({"params": params}, images, method="encode"))
    moments = [encode(to_signed(images[i : i + 64])) for images in (shapes, real) for i in range(0, 256, 64)]
    pixels = (0, 1, 2)
    average, square = np.mean([(mean.mean(pixels), (mean**2 + std**2).mean(pixels)) for mean, std in moments], axis=0)
    deviation = float(np.sqrt((square - average**2).mean()))
    print(f"vae latents: std {deviation:.3f}", flush=True)

    output.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, "scaling_factor": round(1 / deviation, 4)}
    (output / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tensors = {name: leaf.astype(np.float16) for name, leaf in to_published(params, VAE_PREFIX).items()}
    save_file(tensors, output / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
