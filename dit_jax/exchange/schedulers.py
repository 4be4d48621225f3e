"""The scheduler of diffusers that walks where a sampler of ours walks, on the same grid of times.

    1,000 betas       uniform | trailing     ddim, euler, euler_ancestral   DDIMScheduler (eta: its own, 0, 1)
                                             ddpm                           DDPMScheduler
                                             dpmpp_2m                       DPMSolverMultistepScheduler
                                             heun                           HeunDiscreteScheduler
    rectified_flow    uniform | trailing |   euler, ddim with eta 0         FlowMatchEulerDiscreteScheduler
                      shifted                ddpm, euler_ancestral,         DPMSolverMultistepScheduler, sde, order 1
                                             ddim with eta 1
                                             dpmpp_2m                       DPMSolverMultistepScheduler
    edm               karras                 euler, ddim with eta 0         EDMEulerScheduler
                                             dpmpp_2m                       EDMDPMSolverMultistepScheduler

Euler's steps on 1,000 betas are DDIM's, with or without fresh noise (`dit_jax.diffusion.samplers`, eq. 1); diffusers'
own Euler starts from a little less noise. Of rectified flow, the first order of SDE-DPM-Solver++ (Lu et al. 2022b) is
the posterior that ddpm draws from: put lambda = ln(alpha / sigma) into eq. 2 there, and exp(-2h) is 1 - q.

With 1,000 betas diffusers knows whole steps alone: numbers of steps that divide 1,000 are exact, others are rounded.
What has no counterpart is refused by name.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from dit_jax.diffusion.schedules import R_MAX, R_MIN, T
from dit_jax.errors import ConfigError

BETAS: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
FLOW, EDM = "rectified_flow", "edm"
ANCESTRAL = {"ddpm": 1.0, "euler_ancestral": 1.0, "euler": 0.0}  # eta of eq. 1; ddim has its own


class Scheduler(NamedTuple):
    """A scheduler of diffusers.

    Attributes:
      name: of its class.
      options: of its constructor.
      times: how a step is told as a time in [0, 1]: ``discrete``, ``flow`` or ``edm``.
      eta: of its steps; only DDIMScheduler has one.
    """

    name: str
    options: dict[str, Any]
    times: str
    eta: float


def scheduler_of(diffusion: Mapping[str, Any], sample: Mapping[str, Any], learned_variance: bool) -> Scheduler:
    """The counterpart of a sampler.

    Args:
      diffusion, sample: sections of a config.
      learned_variance: whether the network tells its variance too.

    Raises:
      ConfigError: there is none.
    """
    for key, off in (("guidance_rescale", 0.0), ("apg_parallel", 1.0), ("apg_norm", 0.0)):
        if sample[key] != off:
            raise ConfigError(f"sample.{key}={sample[key]} has no counterpart in diffusers; --{key}={off:g} leaves it")
    make = _discrete if diffusion["schedule"] in BETAS else {FLOW: _flow, EDM: _edm}[diffusion["schedule"]]
    return make(diffusion, sample, learned_variance)


def _discrete(diffusion: Mapping[str, Any], sample: Mapping[str, Any], learned_variance: bool) -> Scheduler:
    if diffusion["prediction"] not in PREDICTIONS:
        _refuse_prediction(diffusion, PREDICTIONS)
    if sample["grid"] not in ("uniform", "trailing"):
        _refuse("grid", sample, diffusion, "uniform, trailing")
    sampler = sample["sampler"]
    options = {
        "num_train_timesteps": T,
        **BETAS[diffusion["schedule"]],
        "prediction_type": PREDICTIONS[diffusion["prediction"]],
        "timestep_spacing": "trailing",
    }
    if sampler == "dpmpp_2m":
        return Scheduler("DPMSolverMultistepScheduler", options | _dpm("dpmsolver++", 2), "discrete", 0.0)
    if sampler == "heun":
        return Scheduler("HeunDiscreteScheduler", options, "discrete", 0.0)
    options["clip_sample"] = False
    if sampler == "ddpm":
        options["variance_type"] = "learned_range" if learned_variance else "fixed_small"
        return Scheduler("DDPMScheduler", options, "discrete", 0.0)
    eta = ANCESTRAL.get(sampler, sample["eta"])
    return Scheduler("DDIMScheduler", options | {"set_alpha_to_one": True, "steps_offset": 0}, "discrete", eta)


def _flow(diffusion: Mapping[str, Any], sample: Mapping[str, Any], learned_variance: bool) -> Scheduler:
    if diffusion["prediction"] != "flow":
        _refuse_prediction(diffusion, ["flow"])
    sampler, shift = sample["sampler"], diffusion["shift"]
    if sample["grid"] == "shifted":
        shift = sample["grid_shift"]
    eta = ANCESTRAL.get(sampler, sample["eta"])
    if sampler in ("euler", "ddim") and eta == 0:
        options = {"num_train_timesteps": T, "shift": shift}
        return Scheduler("FlowMatchEulerDiscreteScheduler", options, "flow", 0.0)
    options = {
        "num_train_timesteps": T,
        "use_flow_sigmas": True,
        "flow_shift": shift,
        "prediction_type": "flow_prediction",
    }
    if sampler == "dpmpp_2m":
        return Scheduler("DPMSolverMultistepScheduler", options | _dpm("dpmsolver++", 2), "flow", 0.0)
    if sampler != "heun" and eta == 1 and not (learned_variance and sampler == "ddpm"):
        return Scheduler("DPMSolverMultistepScheduler", options | _dpm("sde-dpmsolver++", 1), "flow", 0.0)
    _refuse("sampler", sample, diffusion, "euler, dpmpp_2m, euler_ancestral, ddpm without a learned variance")


def _edm(diffusion: Mapping[str, Any], sample: Mapping[str, Any], learned_variance: bool) -> Scheduler:
    if diffusion["prediction"] != "v":
        _refuse_prediction(diffusion, ["v"])
    if sample["grid"] != "karras":
        _refuse("grid", sample, diffusion, "karras")
    options = {
        "num_train_timesteps": T,
        "sigma_min": R_MIN,
        "sigma_max": R_MAX,
        "sigma_data": 1.0,
        "sigma_schedule": "karras",
        "rho": sample["grid_rho"],
        "prediction_type": "v_prediction",
    }
    if sample["sampler"] == "dpmpp_2m":
        return Scheduler("EDMDPMSolverMultistepScheduler", options | _dpm("dpmsolver++", 2), "edm", 0.0)
    if sample["sampler"] == "euler" or (sample["sampler"] == "ddim" and sample["eta"] == 0):
        return Scheduler("EDMEulerScheduler", options, "edm", 0.0)
    _refuse("sampler", sample, diffusion, "euler, dpmpp_2m")


def _dpm(algorithm: str, order: int) -> dict[str, Any]:
    return {
        "algorithm_type": algorithm,
        "solver_order": order,
        "solver_type": "midpoint",
        "final_sigmas_type": "zero",
        "lower_order_final": True,
    }


def _refuse(key: str, sample: Mapping[str, Any], diffusion: Mapping[str, Any], valid: str) -> NoReturn:
    eta = f" with eta={sample['eta']}" if key == "sampler" and sample["sampler"] == "ddim" else ""
    raise ConfigError(
        f"sample.{key}={sample[key]}{eta} on schedule {diffusion['schedule']} has no counterpart in diffusers;"
        f" choose another with --{key}: {valid}"
    )


def _refuse_prediction(diffusion: Mapping[str, Any], valid: Any) -> NoReturn:
    raise ConfigError(
        f"diffusion.prediction={diffusion['prediction']} on schedule {diffusion['schedule']} has no counterpart in"
        f" diffusers, which has {', '.join(valid)} there; --format=safetensors exports it for dit_jax"
    )
