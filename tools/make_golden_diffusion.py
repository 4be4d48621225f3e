"""Records what diffusers' schedulers do with a given network: ``python -m tools.make_golden_diffusion``.

Each case is a scheduler, run for ten steps on a small formula in place of a network, from recorded noise. The
states along the way go into ``tests/diffusion/golden/trajectories.npz``, so that the samplers are held to them
where diffusers is not installed. The tests import this file for the cases, and run it live where it is.

States are stored on the scale of x_t = alpha x0 + sigma epsilon; diffusers' Euler and Heun on variance
preserving schedules hold x / alpha instead.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "diffusion" / "golden" / "trajectories.npz"
STEPS = 10
SHAPE = (2, 3, 3, 2)  # B h w C
T = 1000

BETAS = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
PREDICTION_TYPE = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample", "flow": "flow_prediction"}


@dataclass(frozen=True)
class Case:
    """One scheduler of diffusers and the sampler that must do the same.

    Attributes:
      scheduler: its class.
      sampler, schedule, prediction, shift, eta: ours.
      spacing: how a variance preserving scheduler spaces its steps; leading starts late, linspace ends early, karras
        is a grid of noise levels, last is the last trained steps, one after the other.
      variance: diffusers' name for the variance of a step of DDPM.
    """

    scheduler: str
    sampler: str
    schedule: str
    prediction: str
    spacing: str = ""
    shift: float = 1.0
    eta: float = 0.0
    variance: str = "fixed_small"

    @property
    def name(self) -> str:
        grid = self.spacing or f"shift{self.shift:g}"
        learned = "-learned" if self.variance == "learned_range" else ""
        return f"{self.sampler}-{self.schedule}-{self.prediction}-eta{self.eta:g}-{grid}{learned}"


CASES = [
    Case("DDPMScheduler", "ddpm", "linear", "epsilon", spacing="leading"),
    Case("DDPMScheduler", "ddpm", "scaled_linear", "v", spacing="trailing"),
    Case("DDPMScheduler", "ddpm", "cosine", "x0", spacing="trailing"),
    # All end at diffusers' step 0: after any other it draws its learned variance once more, and does not return x0.
    Case("DDPMScheduler", "ddpm", "scaled_linear", "epsilon", spacing="leading", variance="learned_range"),
    Case("DDPMScheduler", "ddpm", "linear", "v", spacing="leading", variance="learned_range"),
    Case("DDPMScheduler", "ddpm", "cosine", "x0", spacing="leading", variance="learned_range"),
    Case("DDPMScheduler", "ddpm", "scaled_linear", "v", spacing="last", variance="learned_range"),
    Case("DDPMScheduler", "ddpm", "linear", "epsilon", spacing="last", variance="learned_range"),
    Case("DDIMScheduler", "ddim", "scaled_linear", "epsilon", spacing="leading"),
    Case("DDIMScheduler", "ddim", "cosine", "v", spacing="trailing"),
    Case("DDIMScheduler", "ddim", "linear", "x0", eta=0.5, spacing="trailing"),
    Case("DDIMScheduler", "ddim", "linear", "epsilon", eta=1.0, spacing="leading"),
    Case("DDIMScheduler", "ddim", "cosine", "v", eta=1.0, spacing="trailing"),
    Case("EulerDiscreteScheduler", "euler", "scaled_linear", "epsilon", spacing="linspace"),
    Case("EulerDiscreteScheduler", "euler", "linear", "v", spacing="trailing"),
    Case("EulerDiscreteScheduler", "euler", "cosine", "v", spacing="leading"),
    Case("HeunDiscreteScheduler", "heun", "scaled_linear", "epsilon", spacing="linspace"),
    Case("HeunDiscreteScheduler", "heun", "linear", "x0", spacing="trailing"),
    # Not x0 here: it divides by sigma at the first point, which diffusers has 2.6e-4 off (float32 alpha_bar).
    Case("HeunDiscreteScheduler", "heun", "cosine", "v", spacing="leading"),
    Case("EulerAncestralDiscreteScheduler", "euler_ancestral", "scaled_linear", "epsilon", spacing="linspace"),
    Case("EulerAncestralDiscreteScheduler", "euler_ancestral", "linear", "v", spacing="trailing"),
    Case("DPMSolverMultistepScheduler", "dpmpp_2m", "scaled_linear", "epsilon", spacing="linspace"),
    Case("DPMSolverMultistepScheduler", "dpmpp_2m", "linear", "x0", spacing="trailing"),
    Case("DPMSolverMultistepScheduler", "dpmpp_2m", "cosine", "v", spacing="leading"),
    Case("DPMSolverMultistepScheduler", "dpmpp_2m", "scaled_linear", "v", spacing="karras"),
    Case("DPMSolverMultistepScheduler", "dpmpp_2m", "rectified_flow", "flow", shift=3.0),
    Case("FlowMatchEulerDiscreteScheduler", "euler", "rectified_flow", "flow"),
    Case("FlowMatchEulerDiscreteScheduler", "euler", "rectified_flow", "flow", shift=3.0),
    Case("FlowMatchHeunDiscreteScheduler", "heun", "rectified_flow", "flow"),
    Case("FlowMatchHeunDiscreteScheduler", "heun", "rectified_flow", "flow", shift=3.0),
]


def network(case: Case, x: Any, t: Any, xp: ModuleType) -> Any:
    """The formula in place of a network: x ``[B, h, w, C]``, t ``[B]``, xp is numpy or jax.numpy.

    Returns:
      ``[B, h, w, C]``, or ``[B, h, w, 2 C]`` with a learned variance.
    """
    slope = xp.asarray([1.5, -0.7], x.dtype).reshape(1, 1, 1, -1)
    prediction = 0.9 * xp.tanh(x * slope + xp.cos(3.0 * t).reshape(-1, 1, 1, 1))
    if case.variance == "learned_range":
        return xp.concatenate([prediction, 1.2 * xp.sin(2.0 * x)], -1)
    return prediction


def start_and_noise() -> tuple[np.ndarray, np.ndarray]:
    """x at the start, ``SHAPE``, and the fresh noise of every step, ``[STEPS, *SHAPE]``."""
    draws = np.random.default_rng(0).standard_normal((STEPS + 1, *SHAPE)).astype(np.float32)
    return draws[0], draws[1:]


def make_scheduler(case: Case) -> Any:
    """The scheduler of a case, its timesteps set."""
    import diffusers

    options: dict[str, Any]
    if case.schedule == "rectified_flow":
        options = {"shift": case.shift}
        if case.sampler == "dpmpp_2m":
            options = {"use_flow_sigmas": True, "flow_shift": case.shift, "prediction_type": "flow_prediction"}
    else:
        spacing = {"timestep_spacing": case.spacing}
        spacing = {"karras": {"use_karras_sigmas": True}, "last": {}}.get(case.spacing, spacing)
        options = {"prediction_type": PREDICTION_TYPE[case.prediction], **spacing, **BETAS[case.schedule]}
        if case.sampler in ("ddpm", "ddim"):
            options["clip_sample"] = False
        if case.sampler == "ddpm":
            options["variance_type"] = case.variance
    scheduler = getattr(diffusers, case.scheduler)(num_train_timesteps=T, **options)
    if case.spacing == "last":
        scheduler.set_timesteps(timesteps=list(range(STEPS - 1, -1, -1)))
    else:
        scheduler.set_timesteps(STEPS)
    return scheduler


def trajectory(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Runs diffusers.

    Returns:
      The grid of times ``[STEPS + 1]`` and the states on it ``[STEPS + 1, *SHAPE]``.
    """
    import torch
    from diffusers.schedulers import scheduling_ddpm, scheduling_euler_ancestral_discrete

    scheduler = make_scheduler(case)
    x_start, noise = start_and_noise()
    flow = case.schedule == "rectified_flow"
    scaled = (
        case.sampler in ("euler", "euler_ancestral", "heun") and not flow
    )  # holds x / alpha; its sigmas are sigma / alpha

    def scale() -> float:  # 1 / alpha, now
        return float((1 + scheduler.sigmas[scheduler.step_index or 0] ** 2) ** 0.5) if scaled else 1.0

    grid, states = [], [x_start]
    x = torch.from_numpy(x_start).movedim(-1, 1) * scale()  # channels first, as diffusers has them
    for timestep in scheduler.timesteps:
        t = float(timestep) / T if flow else (float(timestep) + 1) / T
        if case.spacing == "karras" or (flow and case.sampler == "dpmpp_2m"):  # whose timesteps are rounded
            sigma = float(scheduler.sigmas[len(states) - 1])
            t = sigma if flow else time_of(case.schedule, sigma)
        if getattr(scheduler, "dt", None) is None:  # a step begins; Heun's second evaluation is none
            grid.append(t)
        x_in = scheduler.scale_model_input(x, timestep) if scaled else x
        x_last = x_in.movedim(1, -1).numpy()
        prediction = torch.from_numpy(network(case, x_last, np.full(SHAPE[0], t, np.float32), np)).movedim(-1, 1)
        z = torch.from_numpy(noise[len(states) - 1]).movedim(-1, 1)
        options = {"eta": case.eta, "variance_noise": z if case.eta else None} if case.sampler == "ddim" else {}
        with contextlib.ExitStack() as patches:
            for module in (scheduling_ddpm, scheduling_euler_ancestral_discrete):
                patches.enter_context(mock.patch.object(module, "randn_tensor", lambda *args, z=z, **kwargs: z))
            x = scheduler.step(prediction, timestep, x, **options).prev_sample
        if getattr(scheduler, "dt", None) is None or len(grid) == STEPS:  # it ends; the last is Euler's
            states.append(x.movedim(1, -1).numpy() / scale())
    return np.asarray([*grid, 0.0], np.float32), np.stack(states).astype(np.float32)


def alpha_bars(schedule: str) -> np.ndarray:
    """diffusers' table of alpha^2 of a variance preserving schedule, ``[T]``."""
    import diffusers

    return diffusers.DDPMScheduler(num_train_timesteps=T, **BETAS[schedule]).alphas_cumprod.numpy()


def time_of(schedule: str, ratio: float) -> float:
    """The time of a noise level sigma / alpha, between the points of diffusers' table."""
    alpha_bar = alpha_bars(schedule).astype(np.float64)
    table = np.sqrt((1 - alpha_bar) / alpha_bar)
    return float(np.interp(ratio, [0.0, *table], np.linspace(0.0, 1.0, T + 1)))


def main() -> None:
    x_start, noise = start_and_noise()
    arrays = {"x_start": x_start, "noise": noise}
    arrays |= {f"{schedule}/alpha_bars": alpha_bars(schedule)[::37] for schedule in BETAS}
    for case in CASES:
        arrays[f"{case.name}/grid"], arrays[f"{case.name}/states"] = trajectory(case)
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **arrays)
    print(f"{len(CASES)} trajectories in {GOLDEN}, {GOLDEN.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
