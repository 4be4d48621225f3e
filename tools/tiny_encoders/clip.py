"""Trains the embedded CLIP, two small towers that meet in one space, with captions that are nearly right.

For n pictures with captions 1 .. n and wrong captions n + 1 .. n + k, one edit away from true ones, and the
cosines c_ij of picture i and caption j at the learnt inverse temperature s,

    loss = (mean_i CE(s c_i,1..n+k; i) + mean_j<=n CE(s c_1..n,j; j)) / 2                             (1)

where CE is the cross-entropy of a softmax, from which captions that are also true of a picture are left out.
That is the loss of Radford et al. (arXiv:2103.00020, figure 3) with the hard negatives of Yuksekgonul et al.
(arXiv:2210.01936, section 4): without them a bag of words is enough, and which object has which colour is lost.

A diffusion model reads the states of single words, which this loss sees only through the state at the end of the
text. Words and places therefore start far apart, at `WORD_DEVIATION` and `PLACE_DEVIATION`: begun from nearly nothing,
as CLIP's are, they drown in what a short training adds to them, "a circle" reads almost like "a square", and neither
tower knows left from right. Half of the wrong captions are of the kinds that are learnt last.
"""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file

from dit_jax.data.shapes_world import Scene
from dit_jax.encoders.networks import text_network, vision_network
from dit_jax.encoders.tokenizer import Tokenizer
from dit_jax.encoders.weights import TEXT_PREFIX, VISION_PREFIX, to_published
from dit_jax.sharding import make_mesh, put_batch, replicated
from dit_jax.training.encode import to_signed

from .captions import END_OF_TEXT, START_OF_TEXT, meaning, write_tokenizer, wrong_caption
from .pictures import FOLDER_SIZE, Captioned, random_cut

NUM_TOKENS = 1280
LENGTH = 32
CONFIG = {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "projection_dim": 128,
    "logit_scale_init_value": 2.6592,
    "text_config": {
        "model_type": "clip_text_model",
        "vocab_size": NUM_TOKENS,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": 128,
        "bos_token_id": NUM_TOKENS - 2,
        "eos_token_id": NUM_TOKENS - 1,
        "pad_token_id": NUM_TOKENS - 1,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 8,
        "num_channels": 3,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": 128,
    },
}
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 64},
    "do_center_crop": True,
    "crop_size": {"height": 64, "width": 64},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_convert_rgb": True,
}
WORD_DEVIATION = 1.0  # of token embeddings at the start
PLACE_DEVIATION = 0.5  # of position embeddings at the start, in both towers
HARD_EDITS = ("shape", "relation", "swap colours", "swap shapes")  # of every second wrong caption
SHAPES_BATCH = 64  # pictures of the shapes world, each with a true and two wrong captions
REAL_BATCH = 16
LEAST_CUT = 104  # px; real pictures are cut this far at most, so that the caption stays true
PEAK_LEARNING_RATE = 1e-3
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.05
MAX_LOGIT_SCALE = math.log(100)
LOG_EVERY = 100
SAVE_EVERY = 400

Params = Any
Batch = dict[str, np.ndarray]


def batches(
    rng: np.random.Generator,
    scenes: list[Scene],
    drawn: np.ndarray,
    real: Captioned,
    tokenizer: Tokenizer,
    steps: int,
) -> Iterator[Batch]:
    """Pictures [n, ...], the ids and masks of n + k captions, and which of them are true of which picture."""
    longest = int(tokenizer([scene.caption for scene in scenes] + real.captions)[1].sum(axis=1).max())
    for _ in range(steps):
        i = rng.integers(len(scenes), size=SHAPES_BATCH)
        j = rng.integers(len(real.images), size=REAL_BATCH)
        cuts = [random_cut(rng, image, int(rng.integers(LEAST_CUT, FOLDER_SIZE + 1))) for image in real.images[j]]
        captions = [scenes[k].caption for k in i] + [real.captions[k] for k in j]
        wrong = [wrong_caption(rng, scenes[k]) for k in i]
        wrong += [wrong_caption(rng, scenes[k], HARD_EDITS) for k in i]
        meanings = np.array([meaning(scenes[k]) for k in i] + captions[SHAPES_BATCH:])
        ids, mask = tokenizer(captions + wrong)
        yield {
            "images": to_signed(np.concatenate([drawn[i], np.stack(cuts)])),
            "ids": ids[:, :longest],
            "mask": mask[:, :longest],
            "same": meanings[:, None] == meanings[None],  # [n, n]
        }


def contrastive_loss(towers: tuple[Any, Any], params: Params, batch: Batch) -> jax.Array:
    """Equation (1)."""
    text, vision = towers
    _, pictures = vision.apply({"params": params["vision"]}, batch["images"])
    captions = text.apply({"params": params["text"]}, batch["ids"], batch["mask"]).pooled
    cosines = unit(pictures) @ unit(captions).T  # [n, n + k]
    n = len(cosines)
    also_true = jnp.pad(batch["same"] & ~jnp.eye(n, dtype=bool), ((0, 0), (0, cosines.shape[1] - n)))
    logits = jnp.where(also_true, -jnp.inf, jnp.exp(params["logit_scale"]) * cosines)
    of_picture = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(n))
    of_caption = optax.softmax_cross_entropy_with_integer_labels(logits[:, :n].T, jnp.arange(n))
    return (of_picture.mean() + of_caption.mean()) / 2


def unit(vectors: jax.Array) -> jax.Array:
    """Vectors `[n, P]` at length 1."""
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def train(scenes: list[Scene], drawn: np.ndarray, real: Captioned, steps: int, seed: int, output: Path) -> None:
    """Learns the vocabulary, trains for `steps` steps and writes everything every SAVE_EVERY steps and at the end.

    Args:
      drawn: uint8 `[n, 64, 64, 3]`, the pictures of `scenes`.
      real: captioned pictures of 128 px.
      output: folder of the CLIP.
    """
    texts = [scene.caption for scene in scenes] + real.captions
    vocabulary = write_tokenizer(texts, NUM_TOKENS, LENGTH, output)
    assert (vocabulary[START_OF_TEXT], vocabulary[END_OF_TEXT]) == (NUM_TOKENS - 2, NUM_TOKENS - 1)
    tokenizer = Tokenizer(output, LENGTH)

    text = text_network(CONFIG, project=True, skip_layers=0, final_norm=True, dtype=jnp.float32)
    vision = vision_network(CONFIG, project=True, dtype=jnp.float32)
    text_key, vision_key, embedding_key = jax.random.split(jax.random.key(seed), 3)
    ids = jnp.zeros((1, LENGTH), jnp.int32)
    params = {
        "text": text.init(text_key, ids, ids == 0)["params"],
        "vision": vision.init(vision_key, jnp.zeros((1, 64, 64, 3)))["params"],
        "logit_scale": jnp.float32(CONFIG["logit_scale_init_value"]),
    }
    for tower, name, deviation in (
        ("text", "token_embedding", WORD_DEVIATION),
        ("text", "position_embedding", PLACE_DEVIATION),
        ("vision", "position_embedding", PLACE_DEVIATION),
    ):
        embedding_key, key = jax.random.split(embedding_key)
        table = params[tower]["embeddings"][name]
        table["embedding"] = deviation * jax.random.normal(key, table["embedding"].shape)
    schedule = optax.warmup_cosine_decay_schedule(0, PEAK_LEARNING_RATE, WARMUP_STEPS, steps)
    matrices = jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=WEIGHT_DECAY, mask=matrices)
    )
    mesh = make_mesh(jax.devices())
    params, opt_state = jax.device_put((params, optimizer.init(params)), replicated(mesh))

    @jax.jit
    def update(params: Params, opt_state: Any, batch: Batch) -> tuple[Params, Any, jax.Array]:
        value, gradients = jax.value_and_grad(lambda p: contrastive_loss((text, vision), p, batch))(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
        params["logit_scale"] = jnp.minimum(params["logit_scale"], MAX_LOGIT_SCALE)
        return params, opt_state, value

    rng = np.random.default_rng(seed)
    start, losses = time.monotonic(), []
    for step, batch in enumerate(batches(rng, scenes, drawn, real, tokenizer, steps)):
        params, opt_state, value = update(params, opt_state, put_batch(batch, mesh))
        losses.append(float(value))
        if (step + 1) % LOG_EVERY == 0:
            recent, seconds = np.mean(losses[-LOG_EVERY:]), time.monotonic() - start
            print(f"clip step={step + 1}/{steps} loss={recent:.4f} seconds={seconds:.0f}", flush=True)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            write(jax.device_get(params), output)


def write(params: Params, output: Path) -> None:
    """Writes the published layout of a CLIPModel in float16."""
    tensors = {
        **to_published(params["text"], TEXT_PREFIX),
        **to_published(params["vision"], VISION_PREFIX),
        "logit_scale": np.asarray(params["logit_scale"]),
    }
    tensors = {name: leaf.astype(np.float16) for name, leaf in tensors.items()}
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    (output / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    (output / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")
