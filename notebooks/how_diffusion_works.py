# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: kernelspec,jupytext
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
# # How diffusion works
#
# A picture is a point in a space of very many dimensions, and pictures that look like something lie on a thin part of
# it. Here the space has two dimensions, so that everything can be drawn: the data are two arms of a spiral, the arm is
# what the text is for pictures, and the network is small enough to be trained in a minute on a laptop. The algebra is
# not a simplified copy: it is `dit_jax.diffusion`, which the text-to-image model is trained and sampled with.

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

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn

from dit_jax.diffusion import grids, guidance, objectives, samplers
from dit_jax.diffusion.process import Process
from dit_jax.diffusion.schedules import make_schedule

FAST = bool(os.environ.get("DIT_JAX_FAST"))  # a few steps, to see that everything works; nothing is learnt in them
plt.rcParams["figure.dpi"] = 60
COLOURS = np.array(["tab:orange", "tab:blue"])


def scatter(axis, x, arms, title):
    axis.scatter(*np.asarray(x).T, s=3, c=COLOURS[np.asarray(arms)])
    axis.set(title=title, xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=[], yticks=[])


def draw_data(key, count):
    """Points ``[count, 2]`` of about unit variance, and the arm of each, 0 or 1."""
    places, jitter, choice = jax.random.split(key, 3)
    arms = jax.random.bernoulli(choice, shape=(count,)).astype(jnp.int32)
    angle = 3 * jnp.pi * jnp.sqrt(jax.random.uniform(places, (count,), minval=0.05))
    x = angle[:, None] * jnp.stack([jnp.cos(angle + jnp.pi * arms), jnp.sin(angle + jnp.pi * arms)], axis=1)
    return x / 4.6 + 0.03 * jax.random.normal(jitter, x.shape), arms


data, arms = draw_data(jax.random.key(0), 2000)
print(f"standard deviation of the data: {float(jnp.std(data)):.2f}")

# %% [markdown]
# ## 2. The forward process: data dissolve in noise
#
# At time $t$ a point is a mix of itself and of standard normal noise, $x_t = \alpha(t)\, x_0 + \sigma(t)\, \epsilon$. A
# schedule says how much of both. Two of them: the one of Stable Diffusion, which keeps the variance at one, and the
# straight line of rectified flow. From left to right time goes from 0, the data, to 1, nothing but noise.

# %%
schedules = {name: make_schedule(name, shift=1.0) for name in ("scaled_linear", "rectified_flow")}
times = (0.0, 0.1, 0.3, 0.6, 1.0)
keys = jax.random.split(jax.random.key(1), len(data))
figure, axes = plt.subplots(2, len(times), figsize=(12, 5))
for row, (name, schedule) in zip(axes, schedules.items(), strict=True):
    for axis, t in zip(row, times, strict=True):
        x_t, _ = Process(schedule, "v").corrupt(keys, data, jnp.full(len(data), t))
        scatter(axis, x_t, arms, f"t = {t}")
    row[0].set_ylabel(name)
plt.show()

# %%
t = jnp.linspace(0.002, 0.998, 200)
figure, (mix, snr) = plt.subplots(1, 2, figsize=(10, 3))
for (name, schedule), line in zip(schedules.items(), ("-", "--"), strict=True):
    mix.plot(t, schedule.alpha(t), f"C0{line}", label=f"alpha, {name}")
    mix.plot(t, schedule.sigma(t), f"C1{line}", label=f"sigma, {name}")
    snr.plot(t, schedule.log_snr(t), f"C2{line}", label=name)
mix.set(xlabel="time t", ylabel="share of data, of noise")
snr.set(xlabel="time t", ylabel="ln(alpha^2 / sigma^2)")
mix.legend(fontsize="small", loc="center right")
snr.legend()
plt.show()

# %% [markdown]
# ## 3. What the network is asked
#
# It sees $x_t$ and $t$, and could be asked for the data, for the noise, for $v$ or for the flow. These are four ways
# to say one thing: whoever knows one of them, and $x_t$, can compute the others. `Process.convert` does. Below, one
# prediction goes in as the flow and comes out as all four.

# %%
process = Process(schedules["rectified_flow"], "flow")
few = slice(0, 5)
x_t, truth = process.corrupt(keys[few], data[few], jnp.full(5, 0.4))
read = process.convert(truth.flow, x_t, jnp.full(5, 0.4))
for name in ("x0", "epsilon", "v", "flow"):
    print(f"{name:8}", "agrees:", bool(jnp.allclose(getattr(read, name), getattr(truth, name), atol=1e-5)))

# %% [markdown]
# ## 4. Train a network
#
# The target is random: many pairs of data and noise give the same $x_t$. The squared error makes the network answer
# with their average, and this is why the loss does not go to zero, however good the network is. One time in ten it is
# not told the arm; then it learns the average over both, which guidance needs later.

# %%
NO_ARM = 2


class Network(nn.Module):
    """``x_t [B, 2]``, ``t [B]``, ``arms [B]`` -> ``[B, 2]``: what `dit_jax.models` is for pictures."""

    @nn.compact
    def __call__(self, x_t, t, arms):
        waves = 2.0 ** jnp.arange(6) * jnp.pi * t[:, None]
        told = nn.Embed(3, 32)(arms)
        x = jnp.concatenate([x_t, jnp.sin(waves), jnp.cos(waves), told], axis=1)
        for _ in range(3):
            x = nn.silu(nn.Dense(128)(x))
        return nn.Dense(2)(x)


network, steps, B = Network(), 200 if FAST else 6000, 512
optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
params = network.init(jax.random.key(2), data[:1], jnp.zeros(1), arms[:1])
draw_times = objectives.stratified(process.schedule, B)


@jax.jit
def train_step(carry, key):
    params, opt_state = carry
    of_data, of_times, of_noise, of_arms = jax.random.split(key, 4)
    x0, arms = draw_data(of_data, B)
    t = draw_times(jax.random.split(of_times, B), jnp.arange(B) / B)
    x_t, targets = process.corrupt(jax.random.split(of_noise, B), x0, t)
    arms = jnp.where(jax.random.bernoulli(of_arms, 0.1, (B,)), NO_ARM, arms)

    def loss(params):
        return objectives.loss(process, network.apply(params, x_t, t, arms), targets).mean()

    value, gradient = jax.value_and_grad(loss)(params)
    updates, opt_state = optimizer.update(gradient, opt_state)
    return (optax.apply_updates(params, updates), opt_state), value


(params, _), losses = jax.lax.scan(
    train_step, (params, optimizer.init(params)), jax.random.split(jax.random.key(3), steps)
)
figure, axis = plt.subplots(figsize=(6, 3))
axis.plot(losses, lw=0.3)
axis.plot(np.convolve(losses, np.ones(50) / 50, mode="valid"))
axis.set(xlabel="step", ylabel="loss", ylim=(0, None))
plt.show()
print(f"loss {float(losses[:50].mean()):.2f} -> {float(losses[-50:].mean()):.2f}")


# %% [markdown]
# ## 5. Sample: from noise back to data
#
# A sampler starts at noise and goes down a grid of times. At each it asks the network, `denoise(x_t, t)`, and takes a
# step. This is all that a sampler is; they differ in how they step. `euler` and `heun` follow a differential equation,
# with one question a step and with two, `dpmpp_2m` remembers the last answer, and `euler_ancestral` adds fresh noise.


# %%
def predict(x_t, t, arms):
    return network.apply(params, x_t, t, arms)


def draw(sampler, steps, arms, scale=1.0):
    """Points ``[B, 2]`` of these arms."""
    grid = grids.uniform(process.schedule, steps)
    keys = jax.random.split(jax.random.key(4), len(arms))
    denoise = guidance.classifier_free(predict, process, arms, jnp.full_like(arms, NO_ARM), scale)
    noise = samplers.draw_prior(keys, (2,))
    return jax.jit(lambda: samplers.run(sampler(process, grid), keys, noise, grid, [(0, steps, denoise)]))()


wanted = jnp.arange(1000) % 2
figure, axes = plt.subplots(1, 6, figsize=(14, 2.6))
grid, keys = grids.uniform(process.schedule, 24), jax.random.split(jax.random.key(4), len(wanted))
denoise = guidance.conditional(predict, process, wanted)
x = samplers.draw_prior(keys, (2,))
for k in range(25):
    if k in (shown := (0, 8, 14, 18, 21, 24)):
        scatter(axes[shown.index(k)], x, wanted, f"step {k} of 24")
    if k < 24:  # euler remembers nothing, so that a run of one step is one of its steps
        here = grid[k : k + 2]
        x = samplers.run(samplers.euler(process, here), keys, x, here, [(0, 1, denoise)])
plt.show()

# %% [markdown]
# How far are the points from the data? For every sample the nearest of 2,000 points of its own arm, and the mean of
# these distances. It is not everything, as it does not see what is missing; but it shows what more steps are worth.


# %%
def distance(x):
    """Mean distance to the nearest point of the data of the same arm."""
    apart = jnp.linalg.norm(x[:, None] - data[None], axis=-1)
    return float(jnp.where(wanted[:, None] == arms[None], apart, jnp.inf).min(axis=1).mean())


count = (2, 4, 8, 16) if FAST else (2, 4, 8, 16, 32)
figure, axis = plt.subplots(figsize=(6, 3))
for name in ("euler", "heun", "dpmpp_2m", "euler_ancestral"):
    found = [distance(draw(getattr(samplers, name), n, wanted)) for n in count]
    print(f"{name:16}", "  ".join(f"{n} steps {d:.3f}" for n, d in zip(count, found, strict=True)))
    axis.plot(count, found, "o-", label=name)
axis.set(xlabel="steps", ylabel="distance to the data", xticks=count)
axis.legend()
plt.show()

# %% [markdown]
# ## 6. Guidance
#
# Classifier-free guidance asks twice, with the arm and without, and goes on from the second answer past the first. At
# scale 1 the first answer alone counts, at 0 the second, which knows no arm. A larger scale keeps samples away from
# where the other arm could be: at 2 the stray points are gone, and so is a part of the data; at 5 they are pushed past
# it.

# %%
figure, axes = plt.subplots(1, 4, figsize=(12, 3))
for axis, scale in zip(axes, (0.0, 1.0, 2.0, 5.0), strict=True):
    x = draw(samplers.heun, 16, wanted, scale)
    scatter(axis, x, wanted, f"scale {scale:g}")
    print(f"scale {scale:g}: distance {distance(x):.3f}, standard deviation {float(jnp.std(x)):.2f}")
plt.show()

# %% [markdown]
# ## From here to pictures
#
# Put a latent `[32, 32, 4]` of a VAE where the point was, the states of a text encoder where the arm was, and a
# Diffusion Transformer where the small network was. Nothing else changes: `quickstart.ipynb` does it with the same
# functions, and `docs/architecture.md` shows the network.
