"""Trains the embedded encoders: a small VAE and a small CLIP in the layouts of published ones.

    python tools/train_tiny_encoders.py --pictures=emoji --output=dit_jax/assets
    python tools/train_tiny_encoders.py --pictures=emoji --output=dit_jax/assets --evaluate

`--pictures` is a folder of captioned pictures of 128 px; the shipped weights saw Noto Emoji. The second command
only measures what is in the output folder; the first ends with the same measurement. The encoders are written
as they improve, so an interrupted run leaves usable ones.

Hardware: 2 CPU cores with AVX-512. A VAE step takes 0.27 s there when nothing else runs and a CLIP step 0.3 s, which
makes 35 minutes (an estimate: the shipped weights came in parts, `dit_jax/assets/README.md`, which also has what they
reach); the aims are in `tiny_encoders/aims.py`.
"""

import os

# Before JAX is imported: two devices, because XLA's reductions on one CPU device use one core only.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2 --xla_cpu_prefer_vector_width=512")

from pathlib import Path  # noqa: E402

from absl import app, flags  # noqa: E402
from tiny_encoders import aims, clip, vae  # noqa: E402
from tiny_encoders.pictures import read_folder, shapes, with_hard_half  # noqa: E402

SEED = 0
SHAPES_SEED = 2024
NUM_SHAPES = 20_000
OBJECTS = (1, 2, 2, 3)  # two objects twice as often
VAE_STEPS = 4500
CLIP_STEPS = 3000
EVALUATION_SCENES = 1000

_PICTURES = flags.DEFINE_string("pictures", None, "folder of captioned pictures, 128 px", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "folder for tiny_vae and tiny_clip", required=True)
_NETWORKS = flags.DEFINE_multi_enum("network", ["vae", "clip"], ["vae", "clip"], "what to train")
_EVALUATE = flags.DEFINE_bool("evaluate", False, "train nothing, only measure what is in the output folder")


def main(_: list[str]) -> None:
    output, folder = Path(_OUTPUT.value), Path(_PICTURES.value)
    if not _EVALUATE.value:
        real = read_folder(folder, "train")
        if "vae" in _NETWORKS.value:
            drawn = with_hard_half(*shapes(SHAPES_SEED, NUM_SHAPES, OBJECTS))
            vae.train(drawn, real.images, VAE_STEPS, SEED, output / aims.VAE_FOLDER)
        if "clip" in _NETWORKS.value:
            scenes, drawn = shapes(SHAPES_SEED, NUM_SHAPES, OBJECTS)
            clip.train(scenes, drawn, real, CLIP_STEPS, SEED, output / aims.CLIP_FOLDER)
    for name, value in aims.measure(output, folder, EVALUATION_SCENES).items():
        aim = f" (aim: {aims.AIMS[name]:g} or more)" if name in aims.AIMS else ""
        print(f"{name}: {value:.4g}{aim}")
    print(f"bytes: {aims.total_bytes(output)} (aim: {aims.MAX_BYTES} or fewer)")


if __name__ == "__main__":
    app.run(main)
