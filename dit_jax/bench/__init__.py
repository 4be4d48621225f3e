"""Measures what a model takes, and what samplers give: ``python -m dit_jax.bench``."""
