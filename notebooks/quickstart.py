# ---
# jupyter:
#   accelerator: GPU
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: accelerator,kernelspec,jupytext
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # dit_jax: train a text-to-image Diffusion Transformer, draw with it, take it home
#
# Five steps: install, look at the hardware, train on the *shapes world* (captioned pictures drawn by a program)
# while loss and samples are shown, draw your own prompts, export the model as one folder. No weights are
# downloaded: a small VAE and a small CLIP text encoder come with the package.
#
# On Colab choose *Runtime > Change runtime type > GPU* first; any of them will do. On two CPU cores training takes
# nine to twenty minutes.

# %% [markdown]
# ## 1. Install
#
# JAX stays as it is: Colab's own fits its driver, so every package that is already here and belongs to JAX is
# pinned to its version, and pip adds only what is missing. Inside a clone of the repository nothing needs to be
# set; elsewhere `REPOSITORY` is the address of the repository, as you would give it to `git clone`.

# %%
import os
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

REPOSITORY = ""

places = (Path.cwd(), *Path.cwd().parents, Path("dit_jax_repository").resolve())  # the last: cloned before
root = next((folder for folder in places if (folder / "dit_jax" / "sample.py").is_file()), None)
if root is None:
    if not REPOSITORY:
        raise SystemExit("set REPOSITORY in this cell to the address of the dit_jax repository")
    subprocess.run(["git", "clone", "--depth=1", REPOSITORY, "dit_jax_repository"], check=True)
    root = Path("dit_jax_repository").resolve()
os.chdir(root)

installed = {package.name.lower().replace("-", "_"): package.version for package in distributions()}
pins = [f"{name}=={version}" for name, version in installed.items() if name.startswith("jax")]
if "dit_jax" not in installed:
    constraint = Path(tempfile.mkdtemp()) / "constraint.txt"
    constraint.write_text("\n".join(pins))
    install = f"-m pip install --quiet --constraint={constraint} --editable .[notebook]"
    subprocess.run([sys.executable, *install.split()], check=True)
    sys.path.insert(0, str(root))
print("kept:", ", ".join(pins))

# %% [markdown]
# ## 2. What is this machine?

# %%
import jax
import numpy as np

from dit_jax import build, runtime

runtime.set_up(allow_cpu=False, verbose=False)  # stops, and says what to install, where a GPU is there but not used
device = jax.devices()[0]
memory = (device.memory_stats() or {}).get("bytes_limit")
print(f"{len(jax.devices())} x {device.device_kind}" + (f", {memory / 2**30:.0f} GiB for JAX" if memory else ""))
print(f"arithmetic: {np.dtype(build.compute_dtype('auto', device)).name}")

# %% [markdown]
# ## 3. Train
#
# `configs/quickstart.py` is the config of `bash launch/quickstart.sh`. Any key of `configs/default.py` can be
# changed here. A run that was interrupted goes on where its last checkpoint ends when the cell runs again.

# %%
from PIL import Image

from dit_jax.config import load_config
from dit_jax.sample import Pipeline, make_grid

FAST = bool(os.environ.get("DIT_JAX_FAST"))  # a few steps, to see that everything works; nothing is learnt in them
overrides = {"total_steps": "24", "batch_size": "8", "log_every": "4", "sample_every": "12", "save_every": "12",
             "data.num_pictures": "64", "model.num_layers": "2", "sample.steps": "4"} if FAST else {}  # fmt: skip
config = load_config("configs/quickstart.py", overrides)
workdir = Path("runs") / ("notebook_fast" if FAST else "notebook")

source = build.make_source(config, "train")
print(f"{len(source):,} pictures; the first eight:")
for i in range(8):
    print("  ", source[i].captions[0])
make_grid([Image.fromarray(source[i].image) for i in range(8)], columns=8)

# %%
import matplotlib.pyplot as plt
from IPython.display import display

from dit_jax import train

figure, (curve, grid) = plt.subplots(1, 2, figsize=(11, 4.5), width_ratios=(3, 2))
plt.close(figure)  # shown by hand, so that it can change while training runs
screen = display(figure, display_id=True)
losses = {}


def watch(step, found):
    """Draws the loss so far, or the newest grid of samples (averaged parameters, fixed prompts and noise)."""
    if not isinstance(found, dict):
        grid.clear()
        grid.imshow(found)
        grid.set(title=f"samples of step {step}", xticks=[], yticks=[])
    elif "loss" in found:  # a row of validation has none
        losses[step] = found["loss"]
        curve.clear()
        curve.plot(losses.keys(), losses.values(), ".-")
        curve.set(xlabel="step", ylabel="loss", yscale="log")
    screen.update(figure)


state = train.run(config, workdir, watch)

# %% [markdown]
# ## 4. Draw your own prompts
#
# The model knows eight colours, six shapes, two sizes and four relations, and draws one or two objects. Picture *i*
# has the seed `seed + i`, and that seed alone draws it again.

# %%
pipe = Pipeline.load(workdir)
prompts = ["a small red circle", "a large blue star above a small green square"]
images = pipe(prompts, num_images=4, seed=0)
make_grid(images, columns=4)

# %% [markdown]
# ## 5. Export
#
# One folder with the averaged parameters, the config and the two encoders. `Pipeline.load` reads it anywhere, and
# draws the same pictures.

# %%
import shutil

from dit_jax.export import export

folder = Path("exports") / workdir.name
shutil.rmtree(folder, ignore_errors=True)  # of an earlier time
export(pipe, folder, form="safetensors", dtype="float32", copy_encoders=False)
for path in sorted(folder.rglob("*")):
    if path.is_file():
        print(f"{path}  {path.stat().st_size / 2**20:.2f} MiB")

again = Pipeline.load(folder)(prompts, num_images=4, seed=0)
print("same pictures:", all(np.array_equal(a, b) for a, b in zip(images, again, strict=True)))

# %%
shutil.make_archive(str(folder), "zip", folder)
print(f"{folder}.zip")
if "google.colab" in sys.modules:
    from google.colab import files

    files.download(f"{folder}.zip")
