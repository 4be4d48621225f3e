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
# # Explore a model: what do its knobs do?
#
# A trained model is a function of a caption, of noise, and of how it is asked. This notebook turns one knob after the
# other while all else stays: guidance, steps and samplers, the seed, the caption. Each answer is a grid of pictures or
# a curve, and says what one sees in them.
#
# On a GPU every cell takes seconds, on two CPU cores a minute or two.

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
# ## 2. A model
#
# `MODEL` is the folder of a run, of an export (unpacked, if it came as a zip), or the hub id of an export.
# `bash launch/quickstart.sh` trains one that knows coloured shapes, and the prompts below are for those;
# `quickstart.ipynb` trains the same one in `runs/notebook`, and downloads it as a zip.

# %%
MODEL = "runs/quickstart"

# %%
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from dit_jax import runtime
from dit_jax.sample import Pipeline, make_grid

runtime.set_up(allow_cpu=False, verbose=False)  # stops, and says what to install, where a GPU is there but not used
FAST = bool(os.environ.get("DIT_JAX_FAST"))  # few pictures in few steps, to see that everything works
BASE = {"sampler": "dpmpp_2m", "steps": 4 if FAST else 20}

pipe = Pipeline.load(MODEL)
print(f"step {pipe.trained.step} of a run that draws {pipe.config.data.image_size} px")

PROMPTS = [
    "a small red circle",
    "a large blue star",
    "a small green square above a large yellow triangle",
    "a large purple diamond to the left of a small orange cross",
]


def show(rows, labels, title):
    """A grid of pictures, a label before every row."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(9, 9 / len(rows[0]) * len(rows)), squeeze=False)
    for axis, row, label in zip(axes[:, 0], rows, labels, strict=True):
        axis.imshow(make_grid([Image.fromarray(picture) for picture in row], columns=len(row)))
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(label, rotation=0, ha="right", va="center")
    figure.suptitle(title, y=1.0)
    figure.tight_layout()
    plt.show()


# %% [markdown]
# ## 3. Guidance
#
# The sampler asks the network twice at every step, with the caption and without, and goes further in the direction in
# which they differ: with a scale of 1 as far as the caption says, with more further than that. The noise of a column is
# the same in all rows.
#
# At a scale of 1 the model draws what the training set holds, and makes its mistakes; a little more brings the caption
# out. Far too much burns the picture: colours run into their limits and edges become hard, since the sampler is led
# where there are no pictures.

# %%
SCALES = [1.0, 4.0] if FAST else [1.0, 1.5, 2.0, 4.0, 8.0, 16.0]
seeds = range(len(PROMPTS) * 2)
rows = [pipe.draw(PROMPTS * 2, seeds, guidance_scale=scale, **BASE) for scale in SCALES]
show(rows, [f"{scale:g}" for scale in SCALES], "guidance scale")

# %% [markdown]
# A program can judge pictures of the shapes world: whether every object of the caption is there, in its colour, shape,
# size and place. So the best scale need not be guessed.

# %%
from dit_jax.data.shapes_world import IMAGE_SIZE, evaluation_scenes
from dit_jax.metrics.shapes_checker import check

if pipe.config.data.source == "shapes" and pipe.config.data.image_size == IMAGE_SIZE:
    scenes = evaluation_scenes("two_objects", 8 if FAST else 64)
    captions = [scene.caption for scene in scenes]
    right, seen = [], []
    for scale in SCALES:
        pictures = pipe.draw(captions, range(len(captions)), guidance_scale=scale, **BASE)
        right.append(np.mean([check(picture, scene).right for picture, scene in zip(pictures, scenes, strict=True)]))
        seen.append(np.mean((pictures == 0) | (pictures == 255)))
        print(
            f"guidance {scale:g}: {right[-1]:.2f} of {len(captions)} captions right, {seen[-1]:.2f} of values clipped"
        )
    figure, axis = plt.subplots(figsize=(6, 3))
    axis.plot(SCALES, right, "o-", label="right")
    axis.plot(SCALES, seen, "s--", label="values at 0 or 255")
    axis.set(
        xlabel="guidance scale", ylabel="share", xscale="log", xticks=SCALES, xticklabels=[f"{s:g}" for s in SCALES]
    )
    axis.legend()
    plt.show()

# %% [markdown]
# ## 4. Steps and samplers
#
# A deterministic sampler follows a differential equation from noise to a picture, and more steps only follow it more
# closely. So its own picture after very many steps is the one to compare with: the curve below is the error that is
# left, root mean square over all pictures, in levels of 255. `euler` is of first order, its error halves where steps
# double; `heun` and `dpmpp_2m` are of second order. `heun` asks the network twice a step, which the axis counts.

# %%
COUNTS = [2, 4] if FAST else [4, 6, 10, 20, 40]
EVALUATIONS = {"euler": 1, "heun": 2, "dpmpp_2m": 1}  # per step


def drawn(sampler, steps):
    return pipe.draw(PROMPTS, range(len(PROMPTS)), sampler=sampler, steps=steps)


exact = drawn("heun", 8 if FAST else 100).astype(np.float32)
errors, few = {}, []
for sampler, asked in EVALUATIONS.items():
    pictures = [drawn(sampler, count // asked) for count in COUNTS]
    errors[sampler] = [float(np.sqrt(np.mean((picture - exact) ** 2))) for picture in pictures]
    few.append(pictures[1])
    print(f"{sampler}: " + ", ".join(f"{n} evaluations {e:.1f}" for n, e in zip(COUNTS, errors[sampler], strict=True)))
figure, axis = plt.subplots(figsize=(6, 3.5))
for sampler, values in errors.items():
    axis.plot(COUNTS, values, "o-", label=sampler)
axis.set(xlabel="evaluations of the network", ylabel="error (levels of 255)", xscale="log", yscale="log")
axis.legend()
plt.show()
show([*few, exact.astype(np.uint8)], [*errors, "exact"], f"{COUNTS[1]} evaluations")

# %% [markdown]
# ## 5. What is of the seed, and what of the caption?
#
# A row has one caption, a column one seed. Down a column colours and shapes change, and something of the place and the
# background stays: that is decided near the noise, by the seed where the caption leaves it open.

# %%
columns = 3 if FAST else 8
rows = [pipe.draw([prompt] * columns, range(columns), **BASE) for prompt in PROMPTS]
show(rows, [" ".join(prompt.split()[1:4]) for prompt in PROMPTS], "a row is a caption, a column a seed")

# %% [markdown]
# ## 6. Between two captions
#
# A caption reaches the network as text states: numbers, which can be mixed as words cannot. `pipe.text_encoder` gives
# those of captions, and `pipe.draw` takes states in place of captions. Half-way between red and blue the circle is
# purple, between circle and star a shape of both, though no caption said so: states in between are of no caption that
# the model has seen. (Both captions of a pair have as many tokens: states are mixed token by token.)

# %%
from dit_jax.arrays import TextStates

PAIRS = [
    ("a large red circle", "a large blue circle"),
    ("a large green circle", "a large green star"),
    ("a small orange square", "a large orange square"),
]


def mix(first, second, share):
    """Text states between those of two captions, for every share in [0, 1] of the second."""
    states = pipe.text_encoder([first, second])
    weights = np.stack([1 - share, share], axis=1).astype(np.float32)  # [n, 2]
    hidden, pooled = (np.tensordot(weights, np.asarray(a, np.float32), 1) for a in (states.hidden, states.pooled))
    return TextStates(hidden, pooled, np.broadcast_to(states.mask.any(0), hidden.shape[:2]))


share = np.linspace(0, 1, 3 if FAST else 8)
rows = [pipe.draw(mix(*pair, share), [0] * len(share), **BASE) for pair in PAIRS]
show(rows, [f"{first}\nto {second}" for first, second in PAIRS], "from one caption to another, the same noise")

ends = pipe.draw([PAIRS[0][0], PAIRS[0][1]], [0, 0], **BASE)
print("the ends are those of the captions:", bool(np.abs(rows[0][[0, -1]].astype(int) - ends).max() <= 1))

# %% [markdown]
# ## Where to go on
#
# `docs/sampling.md` has every knob, `guidance_interval` and editing among them; `how_diffusion_works.ipynb` has the
# equations in two dimensions; `docs/changes.md` adds a sampler of your own.
