"""What a model must know of its encoders, from a ``config.json`` alone: a dry run needs no weights.

A hub id that was never fetched is looked up in a table of the usual networks instead of downloading one.
"""

from pathlib import Path
from typing import NamedTuple, TypeVar

import jax.numpy as jnp

from dit_jax.encoders import networks, places


class VAEShape(NamedTuple):
    """Of a VAE.

    Attributes:
      factor: f, pixels per latent along a side.
      channels: C.
    """

    factor: int
    channels: int


class TextShape(NamedTuple):
    """Of a text encoder.

    Attributes:
      length: S.
      width: E.
      pooled_width: P.
    """

    length: int
    width: int
    pooled_width: int


SD_VAE, SD3_VAE = VAEShape(8, 4), VAEShape(8, 16)
CLIP_B, CLIP_L, OPENCLIP_H, OPENCLIP_G = (TextShape(77, width, width) for width in (512, 768, 1024, 1280))

# By owner/name or owner/name/subfolder; a pipeline's own vae and text_encoder may be left out of a hub id.
VAES = {
    "stabilityai/sd-vae-ft-mse": SD_VAE,
    "stabilityai/sd-vae-ft-ema": SD_VAE,
    "stabilityai/sdxl-vae": SD_VAE,
    "madebyollin/sdxl-vae-fp16-fix": SD_VAE,
    "CompVis/stable-diffusion-v1-4": SD_VAE,
    "runwayml/stable-diffusion-v1-5": SD_VAE,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": SD_VAE,
    "stabilityai/stable-diffusion-2-1": SD_VAE,
    "stabilityai/stable-diffusion-2-1-base": SD_VAE,
    "stabilityai/stable-diffusion-xl-base-1.0": SD_VAE,
    "stabilityai/stable-diffusion-3-medium-diffusers": SD3_VAE,
    "stabilityai/stable-diffusion-3.5-medium": SD3_VAE,
    "stabilityai/stable-diffusion-3.5-large": SD3_VAE,
    "madebyollin/taesd": SD_VAE,
    "madebyollin/taesdxl": SD_VAE,
    "madebyollin/taesd3": SD3_VAE,
}
TEXT_ENCODERS = {
    "openai/clip-vit-base-patch32": CLIP_B,
    "openai/clip-vit-large-patch14": CLIP_L,
    "CompVis/stable-diffusion-v1-4": CLIP_L,
    "runwayml/stable-diffusion-v1-5": CLIP_L,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": CLIP_L,
    "stabilityai/stable-diffusion-2-1": OPENCLIP_H,
    "stabilityai/stable-diffusion-2-1-base": OPENCLIP_H,
    "stabilityai/stable-diffusion-xl-base-1.0": TextShape(77, CLIP_L.width + OPENCLIP_G.width, 1280),
    "stabilityai/stable-diffusion-xl-base-1.0/text_encoder": CLIP_L,
    "stabilityai/stable-diffusion-xl-base-1.0/text_encoder_2": OPENCLIP_G,
}


def describe_vae(path: str | Path) -> VAEShape:
    """The shape of a VAE; a local one needs its ``config.json``, nothing else.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: a config is damaged or of another network, or a hub id is neither in the table nor cached.
    """
    known = _known_or_folders(path, "vae", VAES, None, "give a local folder with its config.json")
    if isinstance(known, VAEShape):
        return known
    network, _ = networks.open_vae(known[0], jnp.float32)
    return VAEShape(network.factor, network.latent_channels)


def describe_text_encoder(path: str | Path, stated: TextShape | None = None) -> TextShape:
    """The shape of a text encoder; a local one needs its ``config.json``, nothing else.

    Args:
      path: as of ``load_text_encoder``.
      stated: what it is by the user's word, believed of a hub id that is neither in the table nor cached.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: a config is damaged or of another network, or a hub id is neither in the table nor cached.
    """
    remedy = "set model.text_length, model.text_width and model.pooled_width, or give a local folder"
    known = _known_or_folders(path, "text_encoder", TEXT_ENCODERS, stated, remedy)
    if isinstance(known, TextShape):
        return known
    network = networks.open_text(known, None, None, jnp.float32)
    return TextShape(network.length, network.width, network.pooled_width)


Shape = TypeVar("Shape", VAEShape, TextShape)


def _known_or_folders(
    path: str | Path, kind: places.Kind, table: dict[str, Shape], stated: Shape | None, remedy: str
) -> Shape | list[Path]:
    """The row of a hub id, whatever its revision, or the folders of configs that are at hand, or what is stated."""
    name = places.follow_runs(path, kind)
    if not places.is_hub_id(name):
        return places.find(name, kind)
    hub_id = name.partition("@")[0]
    for candidate in (hub_id, hub_id.removesuffix(f"/{kind}")):
        if candidate in table:
            return table[candidate]
    if root := _cached(name, kind):
        return places.folders_of(root, kind)
    if stated:
        return stated
    raise ValueError(f"{name!r} is no local folder, and its shape is not known before it is fetched; {remedy}")


def _cached(name: str, kind: places.Kind) -> Path | None:
    """The folder of a hub id in the cache, if its config is there; the weights may be absent."""
    from huggingface_hub import try_to_load_from_cache

    from dit_jax.encoders import hub

    hub_id = hub.parse(name)
    for file in (f"{kind}/config.json", "config.json"):
        wanted = f"{hub_id.subfolder}/{file}".lstrip("/")
        found = try_to_load_from_cache(hub_id.repo, wanted, revision=hub_id.revision)
        if isinstance(found, str):
            return Path(found.removesuffix(file))
    return None
