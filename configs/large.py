"""The large model: 24 layers of width 1024, as DiT-L, on 32 x 32 x 4 latents (256 px).

    python -m dit_jax.main --config=configs/large.py --config.data.source=folder:my_pictures
    python -m dit_jax.main --config=configs/large.py --dry_run --device=4090

407.5 M parameters, 483.9 GFLOP an image in training, bfloat16 on an RTX 4090. Predicted memory, an estimate:
13.6 GiB at batch 128 in slices of 32 and model.remat=dots. Largest batch in one slice that fits there:
14 with model.remat=none, 67 with dots, 206 with full. Not trained yet: there is no loss and no time to compare with.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.vae = "stabilityai/sd-vae-ft-mse"  # or a folder, or embedded
    c.text_encoder = "openai/clip-vit-large-patch14"
    c.data.source = ""  # folder:PATH, on the command line
    c.accumulate = 4  # slices of 32
    c.model.hidden_size = 1024
    c.model.num_layers = 24
    c.model.num_heads = 16
    c.model.attention_head_dim = 64
    c.model.remat = "dots"
    return c
