"""Frozen networks: the VAE between pictures and latents, CLIP's text tower, and how their files are read."""

from dit_jax.encoders.describe import TextShape, VAEShape, describe_text_encoder, describe_vae
from dit_jax.encoders.frozen import VAE, TextEncoder, load_text_encoder, load_vae

__all__ = [
    "VAE",
    "TextEncoder",
    "TextShape",
    "VAEShape",
    "describe_text_encoder",
    "describe_vae",
    "load_text_encoder",
    "load_vae",
]
