"""dit_jax: a text-to-image latent Diffusion Transformer in JAX and Flax."""

__version__ = "0.1.0"
