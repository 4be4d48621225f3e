"""Draws with the model in this folder: torch, diffusers with its transformers, and transformer/dit.py.

    python sample.py --prompt="a small red circle" --seed=0 --output=picture.png

Picture i has the seed ``seed + i`` and depends on nothing else. The same prompts, noise and steps give the pictures of
``python -m dit_jax.sample``, up to rounding; the noise of a seed is another one there. Steps, guidance and times that
the model was meant for are in ``transformer/config.json`` under ``sampling``.
"""

import argparse
import inspect
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "transformer"))
from dit import load  # noqa: E402

T = 1000  # steps of the discrete schedules
HOLD_X_OVER_ALPHA = ("HeunDiscreteScheduler", "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
Text = tuple[Tensor, Tensor, Tensor]  # hidden [B, S, E], pooled [B, P], mask [B, S]


def set_times(scheduler: Any, sampling: dict[str, Any], steps: int) -> Tensor:
    """Give a scheduler its steps; the time in [0, 1] of every evaluation of the model."""
    if sampling["times"] == "flow":
        points = torch.linspace(1, 0, steps + 1)[:-1]
        if sampling["grid"] == "trailing":
            points = (points * T).round() / T
        if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
            scheduler.set_timesteps(sigmas=points.tolist())
        else:  # which would begin a little below 1, and round its times
            scheduler.set_timesteps(steps)
            shift = scheduler.config.flow_shift
            scheduler.sigmas = torch.cat([shift * points / (1 + (shift - 1) * points), torch.zeros(1)])
            scheduler.timesteps = scheduler.sigmas[:-1] * T
        times = scheduler.sigmas[:-1]
    else:
        scheduler.set_timesteps(steps)
        times = (scheduler.timesteps + 1) / T
    if sampling["times"] == "edm":
        low, high = scheduler.config.sigma_min, scheduler.config.sigma_max
        times = ((scheduler.sigmas[:-1] / low).log() / math.log(high / low)).clamp(1e-6, 1)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    return times.float()


def walk(
    scheduler: Any,
    predict: Callable[[Tensor, float], Tensor],
    noise: Tensor,
    sampling: dict[str, Any],
    steps: int,
    generators: Sequence[torch.Generator] | None,
) -> Tensor:
    """From noise to latents, ``[B, C, h, w]``.

    Args:
      scheduler: of diffusers.
      predict: the model, of noised latents and a time.
      noise: standard normal.
      sampling: of ``transformer/config.json``.
      steps: of the scheduler.
      generators: of fresh noise on the way, one per picture.
    """
    times = set_times(scheduler, sampling, steps)
    scaled = type(scheduler).__name__ in HOLD_X_OVER_ALPHA
    x = noise * (1 + float(scheduler.sigmas[0]) ** 2) ** 0.5 if scaled else noise
    known = inspect.signature(scheduler.step).parameters
    options = {key: value for key, value in (("eta", sampling["eta"]), ("generator", generators)) if key in known}
    returns_x0 = scheduler.config.get("variance_type") == "learned_range"  # diffusers would add noise to it
    for i, (timestep, t) in enumerate(zip(scheduler.timesteps, times.tolist(), strict=True)):
        seen = scheduler.scale_model_input(x, timestep) if scaled else x
        step = scheduler.step(predict(seen, t), timestep, x, **options)
        x = step.pred_original_sample if returns_x0 and i == len(times) - 1 else step.prev_sample
    return x


class Model:
    """All components of a folder, on a device."""

    def __init__(self, folder: Path, device: str):
        def read(name: str) -> Any:
            library, cls = index[name]
            return getattr({"diffusers": diffusers, "transformers": transformers}[library], cls)

        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        self.config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
        self.device = torch.device(device)
        transformers.logging.set_verbosity_error()  # a CLIP has more towers than the one that is read
        self.vae = read("vae").from_pretrained(folder / "vae", torch_dtype=torch.float32).to(device)
        self.text_encoder = read("text_encoder").from_pretrained(folder / "text_encoder", dtype=torch.float32)
        self.text_encoder.to(device)
        self.tokenizer = read("tokenizer").from_pretrained(folder / "tokenizer")
        self.scheduler = read("scheduler").from_pretrained(folder / "scheduler")
        files = folder / "transformer" / "config.json", folder / "transformer" / "diffusion_pytorch_model.safetensors"
        self.transformer = load(*files).float().eval().to(device)

    def encode(self, prompts: list[str]) -> Text:
        """Text states; longer prompts are cut."""
        length = self.config["text_length"]
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(self.device)
        states = self.text_encoder(tokens.input_ids)
        mask = tokens.attention_mask.bool()
        pooled = states.text_embeds if "text_embeds" in states else states.pooler_output
        return states.last_hidden_state * mask[:, :, None], pooled, mask

    @torch.no_grad()
    def draw(
        self,
        prompts: list[str],
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        noise: Tensor | None = None,
    ) -> list[Any]:
        """One PIL picture per prompt; None is what the model was meant for, ``noise [B, C, h, w]`` replaces the
        seed's.
        """
        sampling, B = self.config["sampling"], len(prompts)
        steps = sampling["steps"] if steps is None else steps
        scale = sampling["guidance_scale"] if guidance_scale is None else guidance_scale
        sides = [(side or sampling["image_size"]) // sampling["pixels_per_latent"] for side in (height, width)]
        channels = self.config["in_channels"]
        generators = [torch.Generator().manual_seed(seed + i) for i in range(B)]
        if noise is None:
            noise = torch.stack([torch.randn(channels, *sides, generator=generator) for generator in generators])
        text = self.encode(prompts)
        empty = self.transformer.null_text(B) if negative_prompt is None else self.encode([negative_prompt] * B)
        both = [torch.cat(pair) for pair in zip(text, empty, strict=True)]
        low, high = sampling["guidance_interval"]
        told = self.scheduler.config.get("variance_type") == "learned_range"

        def predict(x: Tensor, t: float) -> Tensor:
            if scale == 1 or not low <= t <= high:
                out = self.transformer(x, torch.full([B], t, device=x.device), *text)
                return out if told else out[:, :channels]
            with_text, without = self.transformer(
                torch.cat([x, x]), torch.full([2 * B], t, device=x.device), *both
            ).chunk(2)
            out = without[:, :channels] + scale * (with_text - without)[:, :channels]
            return torch.cat([out, with_text[:, channels:]], dim=1) if told else out

        x = walk(self.scheduler, predict, noise.to(self.device), sampling, steps, generators)
        shift, factor = (torch.tensor(self.config[f"latents_{key}"], device=x.device) for key in ("shift", "scale"))
        raw = x / factor[:, None, None] + shift[:, None, None]
        pixels = (self.vae.decode(raw).sample.clamp(-1, 1) + 1) / 2
        return diffusers.utils.numpy_to_pil(pixels.permute(0, 2, 3, 1).cpu().numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws with the model in this folder.")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: what the model was meant for, as for the others")
    parser.add_argument("--guidance_scale", type=float, help="1 is off")
    parser.add_argument("--negative_prompt", help="default: the learned null caption")
    parser.add_argument("--height", type=int, help="pixels")
    parser.add_argument("--width", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", default="picture.png")
    options = vars(parser.parse_args())
    output, prompt = options.pop("output"), options.pop("prompt")
    (picture,) = Model(HERE, options.pop("device")).draw([prompt], **options)
    picture.save(output)
    print(output)


if __name__ == "__main__":
    main()
