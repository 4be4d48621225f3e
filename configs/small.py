"""The small model: 8 layers of width 384 on 32 x 32 x 4 latents (256 px).

    python -m dit_jax.main --config=configs/small.py --config.data.source=folder:my_pictures \\
        --config.vae=sd-vae-ft-mse --config.text_encoder=clip-vit-large-patch14

The last two are folders with the published files; with those it has 19.9 M parameters. Without them the embedded
encoders are used, and without a source the shapes world, whose pictures of 64 px are enlarged. Made for one RTX 4090;
not trained to its end yet, so there is no figure here.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    return default.get_config()
