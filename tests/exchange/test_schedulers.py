"""The scheduler that an export names walks where our sampler walks, on our grid; what has none is refused by name."""

import importlib.util
import sys
from types import ModuleType
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from dit_jax import build
from dit_jax.diffusion import samplers
from dit_jax.diffusion.guidance import conditional
from dit_jax.errors import ConfigError
from dit_jax.exchange.components import SCRIPT, SOURCES
from dit_jax.exchange.schedulers import Scheduler, scheduler_of

STEPS, SHAPE = 10, (2, 3, 3, 2)  # B h w C
FLOW = {"schedule": "rectified_flow", "prediction": "flow"}
EDM = {"schedule": "edm", "prediction": "v"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "ddim": ({"prediction": "epsilon"}, {"sampler": "ddim"}, "DDIMScheduler"),
    "ddim half": ({"schedule": "linear", "prediction": "v"}, {"sampler": "ddim", "eta": 0.5}, "DDIMScheduler"),
    "ddim cosine": (
        {"schedule": "cosine", "prediction": "v"},
        {"sampler": "ddim", "grid": "trailing"},
        "DDIMScheduler",
    ),
    "euler": ({"prediction": "epsilon"}, {"sampler": "euler"}, "DDIMScheduler"),
    "ancestral": ({"prediction": "v"}, {"sampler": "euler_ancestral"}, "DDIMScheduler"),
    "ddpm": ({"schedule": "cosine", "prediction": "x0"}, {"sampler": "ddpm"}, "DDPMScheduler"),
    "ddpm learned": ({"prediction": "epsilon"}, {"sampler": "ddpm"}, "DDPMScheduler"),
    "dpm": ({"prediction": "epsilon"}, {"sampler": "dpmpp_2m"}, "DPMSolverMultistepScheduler"),
    "heun": ({"schedule": "linear", "prediction": "v"}, {"sampler": "heun"}, "HeunDiscreteScheduler"),
    "flow euler": (FLOW, {"sampler": "euler"}, "FlowMatchEulerDiscreteScheduler"),
    "flow of its own shift": (FLOW | {"shift": 3.0}, {"sampler": "ddim"}, "FlowMatchEulerDiscreteScheduler"),
    "flow shifted": (FLOW, {"sampler": "euler", "grid": "shifted"}, "FlowMatchEulerDiscreteScheduler"),
    "flow ddpm": (FLOW, {"sampler": "ddpm"}, "DPMSolverMultistepScheduler"),
    "flow ancestral": (FLOW, {"sampler": "euler_ancestral", "grid": "shifted"}, "DPMSolverMultistepScheduler"),
    "flow dpm": (FLOW | {"shift": 2.0}, {"sampler": "dpmpp_2m", "grid": "trailing"}, "DPMSolverMultistepScheduler"),
    "edm euler": (EDM, {"sampler": "euler", "grid": "karras"}, "EDMEulerScheduler"),
    "edm dpm": (EDM, {"sampler": "dpmpp_2m", "grid": "karras", "grid_rho": 5.0}, "EDMDPMSolverMultistepScheduler"),
}


def config_of(diffusion: dict[str, Any], sample: dict[str, Any]) -> Any:
    config = default.get_config()
    config.diffusion.update(diffusion)
    config.sample.update({"steps": STEPS, **sample})
    return config


def found(config: Any, learned: bool = False) -> Scheduler:
    return scheduler_of(config.diffusion, config.sample, learned)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    spec = importlib.util.spec_from_file_location("torch_sample", SOURCES[SCRIPT])
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(sys, "path", [str(SOURCES[SCRIPT].parent), *sys.path]):
        spec.loader.exec_module(module)
    sys.modules.pop("dit")
    return module


def network(x, t, learned: bool, xp):
    """In place of a DiT: x ``[B, h, w, C]``."""
    slope = xp.asarray([1.5, -0.7], x.dtype).reshape(1, 1, 1, -1)
    out = 0.9 * xp.tanh(x * slope + xp.cos(3.0 * t))
    return xp.concatenate([out, 1.2 * xp.sin(2.0 * x)], -1) if learned else out


def our_walk(config, learned: bool, draws: np.ndarray) -> np.ndarray:
    process = build.make_process(config)
    grid = build.make_grid(config, process)
    sampler = build.make_sampler(config, process, grid)
    denoise = conditional(lambda x, t, text: network(x, t[:, None, None, None], learned, jnp), process, None)

    def walk(x, noise):
        def body(carry, now):
            z, t, t_next = now
            return sampler.step(denoise, z, *carry[:1], t, t_next, carry[1]), None

        return jax.lax.scan(body, (x, sampler.init(x)), (noise, jnp.asarray(grid[:-1]), jnp.asarray(grid[1:])))[0][0]

    with mock.patch.object(samplers, "normal_per_sample", lambda noise, shape: noise):
        return np.asarray(jax.jit(walk)(draws[0], draws[1:]))


def their_walk(script, scheduler: Scheduler, config, learned: bool, draws: np.ndarray) -> np.ndarray:
    import diffusers
    import torch
    from diffusers.schedulers import scheduling_ddim, scheduling_ddpm, scheduling_dpmsolver_multistep

    first, *fresh = (torch.tensor(draw).movedim(-1, 1) for draw in draws)
    left = iter(fresh)

    def predict(x, t):
        return torch.tensor(network(x.movedim(1, -1).numpy(), np.float32(t), learned, np)).movedim(-1, 1)

    one = getattr(diffusers, scheduler.name)(**scheduler.options)
    sampling = {"times": scheduler.times, "eta": scheduler.eta, "grid": config.sample.grid}
    modules = (scheduling_ddim, scheduling_ddpm, scheduling_dpmsolver_multistep)
    patches = [mock.patch.object(m, "randn_tensor", lambda *args, **more: next(left)) for m in modules]
    for patch in patches:
        patch.start()
    try:
        x = script.walk(one, predict, first, sampling, STEPS, None)
    finally:
        for patch in patches:
            patch.stop()
    return x.movedim(1, -1).numpy()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers
@pytest.mark.parametrize("name", CASES)
def test_it_walks_where_our_sampler_walks(script, name):
    diffusion, sample, expected = CASES[name]
    config, learned = config_of(diffusion, sample), "learned" in name
    scheduler = found(config, learned)
    assert scheduler.name == expected
    draws = np.random.default_rng(0).standard_normal((STEPS + 1, *SHAPE)).astype(np.float32)
    ours = our_walk(config, learned, draws)
    theirs = their_walk(script, scheduler, config, learned, draws)
    assert np.abs(theirs - ours).max() <= 2e-4 * np.abs(ours).max()


@pytest.mark.parametrize(
    ("diffusion", "sample", "learned", "named"),
    [
        ({"prediction": "flow"}, {}, False, "diffusion.prediction=flow on schedule scaled_linear"),
        ({}, {"grid": "karras"}, False, "sample.grid=karras on schedule scaled_linear"),
        (FLOW | {"prediction": "v"}, {}, False, "diffusion.prediction=v on schedule rectified_flow"),
        (FLOW, {"sampler": "heun"}, False, "sample.sampler=heun on schedule rectified_flow"),
        (FLOW, {"sampler": "ddim", "eta": 0.5}, False, "sample.sampler=ddim with eta=0.5 on schedule rectified_flow"),
        (FLOW, {"sampler": "ddpm"}, True, "sample.sampler=ddpm on schedule rectified_flow"),
        (EDM, {"sampler": "heun", "grid": "karras"}, False, "sample.sampler=heun on schedule edm"),
        (EDM, {"sampler": "euler"}, False, "sample.grid=uniform on schedule edm"),
        (EDM | {"prediction": "x0"}, {}, False, "diffusion.prediction=x0 on schedule edm"),
        ({}, {"guidance_rescale": 0.5}, False, "sample.guidance_rescale=0.5"),
        ({}, {"apg_norm": 2.0}, False, "sample.apg_norm=2.0"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(diffusion, sample, learned, named):
    with pytest.raises(ConfigError, match="has no counterpart in") as error:
        found(config_of(diffusion, sample), learned)
    assert named in str(error.value) and "\n" not in str(error.value)
