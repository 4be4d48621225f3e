"""The small model: 8 layers of width 384, the tutorial's, on 32 x 32 x 4 latents (256 px).

    python -m dit_jax.main --config=configs/small.py --config.data.source=folder:my_pictures
    python -m dit_jax.main --config=configs/small.py --dry_run --device=4090

19.9 M parameters, 24.2 GFLOP an image in training, bfloat16 on an RTX 4090. Predicted memory, an estimate:
10.1 GiB at batch 128. Largest batch in one slice that fits there:
219 with model.remat=none, 642 with dots, 1174 with full. Not trained yet: there is no loss and no time to compare with.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.vae = "stabilityai/sd-vae-ft-mse"  # or a folder, or embedded
    c.text_encoder = "openai/clip-vit-large-patch14"
    c.data.source = ""  # folder:PATH, on the command line
    return c
