"""The shapes world from nothing, on a laptop: small pictures, embedded encoders, token-level text.

    bash launch/quickstart.sh
    python -m dit_jax.main --config=configs/quickstart.py

Made for two CPU cores and about ten minutes of training. What it reached so far is in docs/results.md.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.total_steps = 4_500
    c.batch_size = 32
    c.learning_rate = 2e-3
    c.warmup_steps = 200
    c.adam_b2 = 0.99
    c.weight_decay = 0.0
    c.ema_decay = 0.998
    c.log_every = 50
    c.save_every = 1_000
    c.sample_every = 1_000
    c.data.image_size = 64
    c.latents.normalize = "measured"
    c.diffusion.schedule = "rectified_flow"
    c.diffusion.prediction = "flow"
    c.diffusion.times = "logit_normal"
    c.model.hidden_size = 192
    c.model.num_layers = 6
    c.model.num_heads = 3
    c.model.dropout = 0.0
    c.model.text_mode = "cross"
    c.model.modulation = "adaln_zero"
    c.sample.sampler = "euler"
    c.sample.steps = 25
    c.sample.guidance_scale = 3.0
    c.sample.prompts = (
        "a large red circle",
        "a small blue square",
        "a small green star to the left of a large yellow triangle",
        "a large purple diamond above a small orange cross",
    )
    return c
