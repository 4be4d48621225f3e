"""The small model: 8 layers of width 384 on 32 x 32 x 4 latents (256 px), 19.9 M parameters.

python -m dit_jax.main --config=configs/small.py --config.data.source=folder:my_pictures
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    return default.get_config()
