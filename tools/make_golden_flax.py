"""Golden values of Flax files: tiny networks saved by the last releases that had Flax classes, and what they return.

    python3.11 -m venv flaxvenv && flaxvenv/bin/pip install transformers==4.57.6 diffusers==0.36.0 flax==0.12.8 \\
        jax==0.10.2 safetensors
    flaxvenv/bin/python tools/make_golden_flax.py tests/encoders/golden

An environment of its own, as later releases of both have no Flax classes; it needs no torch. Every case becomes a
folder with ``config.json``, ``*.msgpack`` and for text the tokenizer, just as ``save_pretrained`` of the class writes
it; next to it ``CASE.expected.safetensors`` holds inputs and outputs. Sizes, vocabulary and the rounding of the weights
are those of make_golden_encoders.py.
"""

import sys
from pathlib import Path
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import transformers
from make_golden_encoders import BOS, EOS, TEXT, TEXT_LENGTH, VAES, VISION, WORDS, write_tokenizer
from safetensors.numpy import save_file

# By published class, the changes to TEXT, and the type of the file. An end of text of 2 is what old configs say.
TEXTS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "flax_text": ("FlaxCLIPTextModel", {"hidden_act": "quick_gelu", "eos_token_id": 2}, jnp.bfloat16),
    "flax_text_projected": ("FlaxCLIPTextModelWithProjection", {"hidden_act": "gelu"}, jnp.float32),
    "flax_clip": ("FlaxCLIPModel", {"hidden_act": "quick_gelu", "eos_token_id": 2}, jnp.float16),
}
VAE_CASE, VAE_TYPE = "flax_vae", jnp.bfloat16
SHARDED = {"flax_clip": "10KB"}


def random_params(shapes: Any, seed: int, dtype: Any) -> Any:
    """Random parameters that float32, float16 and bfloat16 hold exactly; norms are about one."""
    random = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> jax.Array:
        centre = 1.0 if path[-1].key == "scale" else 0.0
        values = centre + 0.25 * random.standard_normal(leaf.shape)
        return jnp.asarray((64 * values).round().clip(-255, 255) / 64, dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def text_case(case: str, seed: int, folder: Path) -> dict[str, np.ndarray]:
    """Captions of several lengths and their states; for a whole CLIP a picture too."""
    published_class, changes, dtype = TEXTS[case]
    text = {**TEXT, **changes}
    if published_class == "FlaxCLIPModel":
        vision = {**VISION, "hidden_act": changes["hidden_act"]}
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=TEXT["projection_dim"])
    else:
        config = transformers.CLIPTextConfig(**text)
    network = getattr(transformers, published_class)(config, seed=0)
    params = random_params(network.params, seed, dtype)
    network.save_pretrained(folder, params=params, max_shard_size=SHARDED.get(case, "1GB"))
    write_tokenizer(folder, "<|endoftext|>")

    random = np.random.default_rng(seed)
    ids = np.full((4, TEXT_LENGTH), EOS, np.int32)
    lengths = np.array([2, 5, 9, TEXT_LENGTH])
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = [BOS, *random.integers(0, len(WORDS), length - 2), EOS]
    found = {"ids": ids, "mask": np.arange(TEXT_LENGTH)[None] < lengths[:, None]}
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    if published_class == "FlaxCLIPModel":
        images = random.standard_normal((2, 3, VISION["image_size"], VISION["image_size"])).astype(np.float32)
        states = network(ids, images, params=params, output_hidden_states=True)
        found["images"] = images.transpose(0, 2, 3, 1)
        found["image_hidden"] = states.vision_model_output.last_hidden_state
        found["image_pooled"] = network.get_image_features(images, params=params)
        states = states.text_model_output
        found["pooled"] = states.pooler_output
    else:
        states = network(ids, params=params, output_hidden_states=True)
        found["pooled"] = states.text_embeds if "Projection" in published_class else states.pooler_output
    return found | {"hidden": states.last_hidden_state, "hidden_before_last": states.hidden_states[-2]}


def vae_case(seed: int, folder: Path) -> dict[str, np.ndarray]:
    """Pictures that are not square, their moments, and latents decoded."""
    levels = len(VAES["vae_sd"]["block_out_channels"])
    network = diffusers.FlaxAutoencoderKL(
        **VAES["vae_sd"],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    )
    shapes = jax.eval_shape(network.init_weights, jax.random.key(0))
    params = random_params(shapes, seed, VAE_TYPE)
    network.save_pretrained(folder, params=params)

    variables = {"params": jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)}
    random = np.random.default_rng(seed)
    factor = 2 ** (levels - 1)
    images = random.uniform(-1, 1, (2, 3, 4 * factor, 6 * factor)).astype(np.float32)
    posterior = network.apply(variables, images, method="encode").latent_dist
    latents = random.standard_normal(posterior.mean.shape).astype(np.float32)  # channels last
    decoded = network.apply(variables, latents.transpose(0, 3, 1, 2), method="decode").sample
    return {
        "images": images.transpose(0, 2, 3, 1),
        "mean": posterior.mean,
        "std": posterior.std,
        "latents": latents,
        "decoded": decoded.transpose(0, 2, 3, 1),
    }


def main(out: Path) -> None:
    """Writes every case."""
    expected = {case: text_case(case, seed, out / case) for seed, case in enumerate(TEXTS)}
    expected[VAE_CASE] = vae_case(len(TEXTS), out / VAE_CASE)
    for case, found in expected.items():
        arrays = {name: np.ascontiguousarray(value) for name, value in found.items()}
        save_file(arrays, out / f"{case}.expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
