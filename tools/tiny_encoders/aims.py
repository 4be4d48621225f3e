"""What the embedded encoders must reach, and how it is measured, on pictures that they never learnt from."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.data.shapes_world import EVALUATION_CLASSES, Scene, evaluation_scenes, render
from dit_jax.encoders import VAE, load_vae
from dit_jax.encoders.networks import read_config, text_network, vision_network
from dit_jax.encoders.tokenizer import Tokenizer
from dit_jax.encoders.weights import TEXT_PREFIX, VISION_PREFIX, read_tensors, to_linen, weight_files
from dit_jax.metrics.shapes_checker import check
from dit_jax.training.encode import to_signed

from .captions import meaning, wrong_caption
from .clip import unit
from .pictures import Captioned, read_folder, to_uint8

VAE_FOLDER, CLIP_FOLDER = "tiny_vae", "tiny_clip"
MAX_BYTES = 4_000_000
CHOICES = 64  # captions to choose from

# name of a figure: the least that it must be
AIMS = {
    "accepted one_object": 0.995,
    "accepted two_objects": 0.98,
    "retrieval two_objects": 0.95,
    "psnr of real pictures": 24.0,
}


class Clip(NamedTuple):
    """Both towers of a CLIP folder with the projections into their common space."""

    tokenizer: Tokenizer
    text: jax.stages.Wrapped
    vision: jax.stages.Wrapped

    def cosines(self, images: np.ndarray, captions: list[str]) -> np.ndarray:
        """Cosines `[n, m]` of n pictures, uint8 `[n, 64, 64, 3]`, and m captions."""
        texts = self.text(*self.tokenizer(captions)).pooled
        _, pictures = self.vision(to_signed(images))
        return np.asarray(unit(pictures) @ unit(texts).T)


def load_clip(folder: Path) -> Clip:
    """Both towers of a CLIP folder, as published."""
    config, tensors = read_config(folder), read_tensors(weight_files(folder))
    text = text_network(config, project=True, skip_layers=0, final_norm=True, dtype=jnp.float32)
    vision = vision_network(config, project=True, dtype=jnp.float32)
    key, ids = jax.random.key(0), jnp.zeros((1, text.max_position_embeddings), jnp.int32)
    image = jnp.zeros((1, vision.image_size, vision.image_size, 3))
    text_params = to_linen(tensors, jax.eval_shape(text.init, key, ids, ids == 0)["params"], TEXT_PREFIX)
    vision_params = to_linen(tensors, jax.eval_shape(vision.init, key, image)["params"], VISION_PREFIX)
    return Clip(
        Tokenizer(folder, text.max_position_embeddings),
        jax.jit(lambda ids, mask: text.apply({"params": text_params}, ids, mask)),
        jax.jit(lambda images: vision.apply({"params": vision_params}, images)),
    )


def draw(scenes: list[Scene]) -> np.ndarray:
    """Pictures of scenes, uint8 `[n, 64, 64, 3]`."""
    return np.stack([render(scene) for scene in scenes])


def total_bytes(assets: Path) -> int:
    """What the files of both encoders weigh together."""
    return sum(path.stat().st_size for name in (VAE_FOLDER, CLIP_FOLDER) for path in (assets / name).iterdir())


def round_trip(vae: VAE, images: np.ndarray) -> np.ndarray:
    """uint8 pictures through the mean of the VAE's posterior and back."""
    mean, _ = vae.encode(to_signed(images))
    return to_uint8(vae.decode(mean))


def accepted_share(vae: VAE, scenes: list[Scene]) -> float:
    """Of the pictures that the shapes checker accepts, the share that it accepts after the VAE."""
    images = draw(scenes)
    pairs = zip(images, round_trip(vae, images), scenes, strict=True)
    after = [check(decoded, scene).right for image, decoded, scene in pairs if check(image, scene).right]
    return float(np.mean(after))


def mean_psnr(vae: VAE, images: np.ndarray) -> float:
    """Mean over pictures of their peak signal-to-noise ratio after the VAE, in dB."""
    error = (images.astype(np.float64) - round_trip(vae, images)) / 255
    return float(np.mean(-10 * np.log10((error**2).mean(axis=(1, 2, 3)))))


def retrieval(clip: Clip, images: np.ndarray, captions: list[str], meanings: list[str]) -> float:
    """The share of pictures for which the best of CHOICES captions has their meaning; a rest is left out."""
    hits = []
    for start in range(0, len(images) - CHOICES + 1, CHOICES):
        best = start + clip.cosines(images[start : start + CHOICES], captions[start : start + CHOICES]).argmax(axis=1)
        hits += [meanings[start + i] == meanings[j] for i, j in enumerate(best)]
    return float(np.mean(hits))


def scene_retrieval(clip: Clip, scenes: list[Scene]) -> float:
    """`retrieval` for scenes, where "a picture of A above B" and "there is A above B" mean the same."""
    images, captions = draw(scenes), [scene.caption for scene in scenes]
    return retrieval(clip, images, captions, [meaning(scene) for scene in scenes])


def nearly_right(clip: Clip, scenes: list[Scene]) -> float:
    """The share of pictures that are nearer to their caption than to one that is wrong in one point."""
    rng, images = np.random.default_rng(0), draw(scenes)
    true = clip.cosines(images, [scene.caption for scene in scenes]).diagonal()
    wrong = clip.cosines(images, [wrong_caption(rng, scene) for scene in scenes]).diagonal()
    return float(np.mean(true > wrong))


def latent_deviation(vae: VAE, images: np.ndarray) -> list[float]:
    """Standard deviation of each channel of the scaled latents."""
    mean, std = vae.encode(to_signed(images))
    sampled = mean + std * jax.random.normal(jax.random.key(0), mean.shape)
    return [round(float(value), 3) for value in sampled.std(axis=(0, 1, 2)) * vae.latent_scale.scale]


def measure(assets: Path, folder: Path, count: int) -> dict[str, float]:
    """All figures of the encoders in `assets`, on `count` scenes of each class and the held-out real pictures."""
    vae, clip = load_vae(assets / VAE_FOLDER), load_clip(assets / CLIP_FOLDER)
    figures = {}
    for name in EVALUATION_CLASSES:
        scenes = evaluation_scenes(name, count)
        figures[f"accepted {name}"] = accepted_share(vae, scenes)
        figures[f"retrieval {name}"] = scene_retrieval(clip, scenes)
        figures[f"nearly right {name}"] = nearly_right(clip, scenes)
    return figures | measure_real(vae, clip, read_folder(folder, "validation"))


def measure_real(vae: VAE, clip: Clip, real: Captioned) -> dict[str, float]:
    """The figures on real pictures."""
    half = real.images.reshape(len(real.images), 64, 2, 64, 2, 3).mean(axis=(2, 4)).round().astype(np.uint8)
    return {
        "psnr of real pictures": mean_psnr(vae, real.images),
        "retrieval of real pictures": retrieval(clip, half, real.captions, real.captions),
    }
