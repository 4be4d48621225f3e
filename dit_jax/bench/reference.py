"""The same train step in PyTorch: the DiT of ``assets/torch/dit.py`` with our parameters, and all that is around it.

Posterior sample, times, noise, caption dropout, loss, backward pass, clipping, AdamW (one fused kernel) and the moving
average (multi-tensor kernels): as `dit_jax.training.step` does it, in the form that PyTorch is fastest at. Compiled, it
is the network that goes through ``torch.compile``, as its users do it.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

import dit_jax
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
    return jax.device_get(np.moveaxis(out.detach().cpu().numpy(), 1, -1)), float(norm)
