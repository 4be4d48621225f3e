"""The base model: 12 layers of width 768, as DiT-B, on 32 x 32 x 4 latents (256 px).

    python -m dit_jax.main --config=configs/base.py --config.data.source=folder:my_pictures
    python -m dit_jax.main --config=configs/base.py --dry_run --device=4090

116.1 M parameters, 137.9 GFLOP an image in training, bfloat16 on an RTX 4090. Predicted memory, an estimate:
9.9 GiB at batch 128 in slices of 32. Largest batch in one slice that fits there:
65 with model.remat=none, 228 with dots, 498 with full. Not trained yet: there is no loss and no time to compare with.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.vae = "stabilityai/sd-vae-ft-mse"  # or a folder, or embedded
    c.text_encoder = "openai/clip-vit-large-patch14"
    c.data.source = ""  # folder:PATH, on the command line
    c.accumulate = 4  # slices of 32
    c.model.hidden_size = 768
    c.model.num_layers = 12
    c.model.num_heads = 12
    c.model.attention_head_dim = 64
    return c
