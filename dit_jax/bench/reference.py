"""The same train step and the same sampler in PyTorch: the DiT of ``assets/torch/dit.py`` with our parameters, and all
that is around it.

Posterior sample, times, noise, caption dropout, loss, backward pass, clipping, AdamW (one fused kernel) and the moving
average (multi-tensor kernels): as `dit_jax.training.step` does it, in the form that PyTorch is fastest at. Compiled, it
is the network that goes through ``torch.compile``, as its users do it. The sampler is their loop over the steps.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dit_jax
from dit_jax import build
from dit_jax.arrays import TextStates
from dit_jax.bench.presets import LATENT_SCALE, Bench
from dit_jax.errors import ConfigError
from dit_jax.models.dit import DiT
from dit_jax.training.formats import side_by_side
from dit_jax.trees import named_leaves

SOURCE = Path(dit_jax.__file__).parent / "assets" / "torch" / "dit.py"


def import_dit() -> ModuleType:
    """The module, which needs torch."""
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("--ref=torch needs PyTorch: pip install 'dit_jax[torch]'")
    spec = importlib.util.spec_from_file_location("dit_jax_torch_dit", SOURCE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks for its types
    spec.loader.exec_module(module)
    return module


def to_torch(array: Any) -> Any:
    """A tensor with the values of an array, on the CPU; of bfloat16 a float32 one."""
    import torch

    array = np.asarray(array)
    return torch.tensor(array.astype(np.float32) if array.dtype.name == "bfloat16" else array)


def channels_last(tensor: Any) -> np.ndarray:
    """Latents ``[B, C, h, w]`` as we have them."""
    return np.moveaxis(tensor.cpu().numpy(), 1, -1)


def channels_first(array: Any) -> np.ndarray:
    """Latents ``[B, h, w, C]`` as PyTorch has them."""
    return np.ascontiguousarray(np.moveaxis(np.asarray(array), -1, 1))


def make_model(model: DiT, params: Any) -> Any:
    """The torch module with these parameters, on the device that torch calculates on."""
    module = import_dit()
    state = module.from_leaves({name: to_torch(leaf) for name, leaf in named_leaves(side_by_side(params)).items()})
    grid = params["pos_embed"]["table"].shape[:2] if "pos_embed" in params else (1, 1)
    config = module.Config.of({field: getattr(model, field) for field in module.Config.__dataclass_fields__})
    made = module.DiT(config, grid)
    made.load_state_dict(state)
    return made.to(device())


def device() -> str:
    """``cuda`` where torch has it."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def autocast(dtype: str) -> Any:
    """The context in which the network computes in ``bfloat16``, or in ``float32``."""
    import torch

    return torch.autocast(device(), torch.bfloat16, enabled=dtype == "bfloat16")


def make_step(bench: Bench, params: Any, compiled: bool) -> Callable[[], None]:
    """One train step of the model with these parameters; calling it takes one and waits for it.

    Args:
      bench: what our step is called with.
      params: ours.
      compiled: whether the network goes through ``torch.compile``.
    """
    import torch

    c, model = bench.config, make_model(bench.model, params).train()
    network = torch.compile(model) if compiled else model
    trained = list(model.parameters())
    ema = [p.detach().clone() for p in trained]
    decays = [p for name, p in model.named_parameters() if name.endswith(".weight")]
    others = [p for name, p in model.named_parameters() if not name.endswith(".weight")]
    optimizer = torch.optim.AdamW(
        [{"params": decays, "weight_decay": c.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=c.learning_rate,
        betas=(c.adam_b1, c.adam_b2),
        fused=True,
    )
    batch = {
        key: to_torch(channels_first(array) if key in ("mean", "std") else array).to(device())
        for key, array in bench.batch.items()
    }
    times = np.linspace(0, 1, 1001, dtype=np.float32)
    alphas, sigmas = (
        to_torch(of(times)).to(device())
        for of in (bench.step.process.schedule.alpha, bench.step.process.schedule.sigma)
    )
    B, C = batch["mean"].shape[0], bench.model.in_channels

    def step() -> None:
        t = torch.rand(B, device=device())
        alpha, sigma = (table[(1000 * t).long()][:, None, None, None] for table in (alphas, sigmas))
        x0 = (batch["mean"] + batch["std"] * torch.randn_like(batch["mean"])) * LATENT_SCALE
        epsilon = torch.randn_like(x0)
        null_hidden, null_pooled, null_mask = model.null_text(B)
        drop = (torch.rand(B, device=device()) < c.caption_dropout)[:, None]
        pooled = torch.where(drop, null_pooled, batch["pooled"])
        mask = torch.where(drop, null_mask, batch["mask"])
        hidden = torch.where(drop[:, :, None], null_hidden, batch["hidden"])
        with autocast(c.dtype):
            prediction = network(alpha * x0 + sigma * epsilon, t, hidden, pooled, mask)
        # a learned variance is trained as well, by a bound that costs next to nothing: here it stands for itself
        loss = torch.nn.functional.mse_loss(prediction[:, :C], epsilon)
        if prediction.shape[1] > C:
            loss = loss + c.diffusion.variance_weight * prediction[:, C:].square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, c.clip_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(ema, trained, 1 - c.ema_decay)
        if device() == "cuda":
            torch.cuda.synchronize()

    return step


def output_and_gradient_norm(bench: Bench, params: Any, inputs: tuple[Any, ...], target: Any) -> tuple[Any, float]:
    """What the torch module makes of inputs, and the norm of the gradient of its squared distance from a target.

    Args:
      bench: whose model and dtype.
      params: ours.
      inputs: ``x_t``, ``t`` and the text, as our model takes them.
      target: ``[B, h, w, C_out]``.
    """
    import torch

    model = make_model(bench.model, params).eval()
    x_t, t, text = inputs
    tensors = [to_torch(array).to(device()) for array in (channels_first(x_t), t, *text)]
    with autocast(bench.config.dtype):
        out = model(*tensors)
    torch.nn.functional.mse_loss(out, to_torch(channels_first(target)).to(device())).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return jax.device_get(channels_last(out.detach())), float(norm)


def make_sampler(
    bench: Bench, params: Any, start: jax.Array, text: TextStates, guidance_scale: float, way: str
) -> Callable[[], Any]:
    """Raw latents ``[B, C, h, w]`` by the guided steps of DDIM without fresh noise; calling it runs them all and waits.

    Args:
      bench: whose model, process and grid.
      params: ours.
      start: the noise to start from, ``[B, h, w, C]``.
      text: of B captions; guided away from is the null caption.
      guidance_scale: above 1.
      way: ``eager``, or ``compile``: the network goes through ``torch.compile``.
    """
    import torch

    dtype = torch.bfloat16 if bench.model.dtype == jnp.bfloat16 else torch.float32
    model = make_model(bench.model, params).eval().to(dtype)
    network = torch.compile(model, dynamic=False) if way == "compile" else model
    process, (B, *_, C) = bench.step.process, start.shape
    assert process.prediction == "epsilon"
    grid = build.make_grid(bench.config, process)
    alphas, sigmas = (np.asarray(of(grid)).tolist() for of in (process.schedule.alpha, process.schedule.sigma))
    with torch.inference_mode():
        times = to_torch(grid).to(device())[:, None].repeat(1, 2 * B)
        noise = to_torch(channels_first(start)).to(device())
        both = [
            torch.cat([to_torch(given).to(device()).to(null.dtype), null])
            for given, null in zip(text, model.null_text(B), strict=True)
        ]

    @torch.inference_mode()
    def sample() -> Any:
        x = noise
        for k in range(len(grid) - 1):
            conditional, null = network(torch.cat([x, x]), times[k], *both)[:, :C].chunk(2)
            epsilon = null + guidance_scale * (conditional - null)
            x0 = (x - sigmas[k] * epsilon) / alphas[k]
            x = alphas[k + 1] * x0 + sigmas[k + 1] * epsilon
        if device() == "cuda":
            torch.cuda.synchronize()
        return x / LATENT_SCALE

    return sample


def cannot_compile() -> type[Exception]:
    """What ``torch.compile`` raises where there is no compiler for it."""
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException
