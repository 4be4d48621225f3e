"""Your own captioned pictures at 128 px with the embedded encoders; made for Noto Emoji, fits any small folder.

    python -m dit_jax.main --config=configs/emoji.py --config.data.source=folder:emoji
    python -m dit_jax.sample --model=runs/emoji --prompt="red apple" --num_images=4
    python -m dit_jax.evaluate --model=runs/emoji --metric=nearest

One CPU core, about 170 ms a step: an hour to step 20,000, where the nearest training picture is that of the caption
for 0.99 of 100 captions (docs/results.md has the grid; the embedded CLIP was an earlier one).
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.total_steps = 24_000
    c.batch_size = 32
    c.learning_rate = 1.5e-3
    c.adam_b2 = 0.99
    c.weight_decay = 0.0
    c.ema_decay = 0.999
    c.log_every = 100
    c.save_every = 2_000
    c.sample_every = 4_000
    c.data.source = ""  # folder:PATH, on the command line
    c.data.image_size = 128
    c.latents.normalize = "measured"
    c.diffusion.schedule = "rectified_flow"
    c.diffusion.prediction = "flow"
    c.diffusion.times = "logit_normal"
    c.model.hidden_size = 256
    c.model.num_layers = 6
    c.model.num_heads = 4
    c.model.patch_size = 4  # 16 tokens: four times the pictures in the same time as with patches of 2
    c.model.dropout = 0.0
    c.model.text_mode = "pooled"  # a caption names one thing
    c.model.modulation = "adaln_zero"
    c.sample.sampler = "ddpm"
    c.sample.steps = 50
    c.sample.guidance_scale = 2.0
    return c
