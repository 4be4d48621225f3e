"""The extra-large model: 28 layers of width 1152, as DiT-XL; head dim 72, on 32 x 32 x 4 latents (256 px).

    python -m dit_jax.main --config=configs/xl.py --config.data.source=folder:my_pictures
    python -m dit_jax.main --config=configs/xl.py --dry_run --device=4090

600.5 M parameters, 711.3 GFLOP an image in training, bfloat16 on an RTX 4090. Predicted memory, an estimate:
16.2 GiB at batch 128 in slices of 16 and model.remat=dots. Largest batch in one slice that fits there:
6 with model.remat=none, 33 with dots, 112 with full. Not trained yet: there is no loss and no time to compare with.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.vae = "stabilityai/sd-vae-ft-mse"  # or a folder, or embedded
    c.text_encoder = "openai/clip-vit-large-patch14"
    c.data.source = ""  # folder:PATH, on the command line
    c.accumulate = 8  # slices of 16
    c.model.hidden_size = 1152
    c.model.num_layers = 28
    c.model.num_heads = 16
    c.model.attention_head_dim = 72
    c.model.remat = "dots"
    return c
