"""The Diffusion Transformer as linen modules, and its analytic cost. Knows no schedule and no config."""
