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
# # Train on your pictures
#
# From a folder of pictures with captions to a model that draws them: look at the folder, encode it once, train, go on
# after a disconnect, draw, and take the model home. Twenty pictures are learnt by heart in some minutes, which shows
# that everything works; a model that draws what it has not seen needs thousands, and `configs/small.py` on a GPU.
#
# Nothing is lost when Colab takes the machine away: every checkpoint is copied to your Drive once it is whole. Connect
# again and run all cells; training goes on from the last one, and ends in the same numbers. (Pictures that were
# uploaded, and are not on the Drive, are asked for again.)

# %% [markdown]
# ## 1. Install
#
# JAX stays as it is, as in `quickstart.ipynb`. Elsewhere than in a clone, `REPOSITORY` is the repository's address.

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
# ## 2. Where are the pictures, and where shall the run be kept?
#
# `PICTURES` is a folder: `cat.jpg` with its caption in `cat.txt` beside it, or one file `metadata.csv` with the columns
# `file_name` and `text` for all. On Colab it may lie on your Drive; where it is not there, a zip of it is asked for.
#
# `KEEP` is where checkpoints are copied to. On Colab that is your Drive unless you name another place; elsewhere your
# disk stays, and nothing is copied unless you name one.

# %%
PICTURES = "my_pictures"
KEEP = ""
# for some dozens; configs/emoji.py is for hundreds, configs/small.py for thousands and a GPU
CONFIG = "configs/overfit.py"
CHANGES = {"total_steps": "2000", "save_every": "250", "log_every": "25"}  # keys of it; {} with the other two

if "google.colab" in sys.modules:
    from google.colab import drive, files

    drive.mount("/content/drive")
    KEEP = KEEP or "/content/drive/MyDrive/dit_jax/my_pictures"
    if not Path(PICTURES).is_dir():
        import io
        import zipfile

        for content in files.upload().values():
            zipfile.ZipFile(io.BytesIO(content)).extractall(PICTURES)

# %% [markdown]
# ## 3. Look at them
#
# As the program sees them: captions under their pictures, turned and cut as training will. Here one finds the pictures
# that lie on their side, and those that have another's caption.

# %%
from IPython.display import Image as Shown
from IPython.display import display

from dit_jax import runtime
from dit_jax.config import load_config
from dit_jax.precompute import inspect, precompute

runtime.set_up(allow_cpu=False, verbose=False)  # stops, and says what to install, where a GPU is there but not used
FAST = bool(os.environ.get("DIT_JAX_FAST"))  # a few steps, to see that everything works; nothing is learnt in them

inspect(load_config(CONFIG, {"data.source": f"folder:{PICTURES}"}), Path("contact_sheet.png"))
display(Shown("contact_sheet.png"))

# %% [markdown]
# ## 4. Encode once
#
# The VAE and the text encoder are frozen, so what they say of a picture and its caption does not change: it is computed
# once, and training reads it from the cache. The same folder gives the same cache, byte for byte, so that it need not
# be kept.

# %%
cache = Path("caches") / "my_pictures"
precompute(load_config(CONFIG, {"data.source": f"folder:{PICTURES}"}), cache, part=0, parts=1, per_shard=4096)

# %% [markdown]
# ## 5. Train
#
# Checkpoints are written to this machine, where disks are quick, and `mirror` copies each of them to `KEEP`: whole, or
# not at all, so that at no moment there is half a run. On a fresh machine this cell begins by copying the run back.
#
# Stop it whenever you like: *Interrupt* saves the step it is at, and copies it. A larger `total_steps` goes on longer.

# %%
import matplotlib.pyplot as plt

from dit_jax import train
from dit_jax.mirror import mirror

overrides = {"data.source": f"cache:{cache}", **CHANGES}
if FAST:
    overrides |= {"total_steps": "24", "save_every": "4", "log_every": "2", "sample_every": "24", "batch_size": "8",
                  "model.num_layers": "1", "model.hidden_size": "32", "model.attention_head_dim": "8",
                  "sample.steps": "2"}  # fmt: skip
config = load_config(CONFIG, overrides)
workdir = Path("runs") / "my_pictures"
if KEEP and not (workdir / "STATUS.json").is_file():  # which is copied last
    print("copied back, steps:", mirror(KEEP, workdir))

figure, (curve, grid) = plt.subplots(1, 2, figsize=(11, 4.5), width_ratios=(3, 2))
plt.close(figure)  # shown by hand, so that it can change while training runs
screen = display(figure, display_id=True)
losses = {}


def watch(step, found):
    """Draws the loss so far, or the newest grid of samples; copies what was saved meanwhile."""
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
    if KEEP:
        try:
            mirror(workdir, KEEP)
        except OSError as error:  # training goes on, and the next row tries again
            print(f"step {step} is not copied to {KEEP} yet: {error}")


try:
    state = train.run(config, workdir, watch, extend=True)
finally:
    if KEEP:
        mirror(workdir, KEEP)

# %% [markdown]
# `report.html` in the run's folder shows the same, and more, in any browser. Where some dozens of pictures are learnt
# by heart the curve falls by a factor of a hundred.

# %% [markdown]
# ## 6. Draw
#
# The first captions of the folder, or what you ask for, each with two noises.

# %%
PROMPTS = []  # such as ["a red apple"]

# %%
import itertools

from dit_jax import build
from dit_jax.sample import Pipeline, make_grid

pipe = Pipeline.load(workdir)
source = build.make_source(load_config(CONFIG, {"data.source": f"folder:{PICTURES}"}), "train")
captions = PROMPTS or [texts[0] for texts in itertools.islice(filter(None, source.captions()), 8)]
for caption in captions:
    print(caption)
make_grid([*pipe(captions, seed=0), *pipe(captions, seed=100)], columns=len(captions))

# %% [markdown]
# ## 7. Take it home
#
# One folder with the averaged parameters, the config, the encoders and a card that says what the model is. On Colab it
# is downloaded as a zip, and put beside the run on your Drive.

# %%
import shutil

from dit_jax.export import export

folder = Path("exports") / "my_pictures"
shutil.rmtree(folder, ignore_errors=True)  # of an earlier time
export(pipe, folder, form="safetensors", dtype="float32", copy_encoders=False)
archive = shutil.make_archive(str(folder), "zip", folder)
print(f"{folder}.zip")
if KEEP:
    shutil.copy(archive, Path(KEEP).with_name("my_pictures.zip"))
if "google.colab" in sys.modules:
    files.download(archive)
