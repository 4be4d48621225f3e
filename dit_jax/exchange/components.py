"""An exported model as a folder of components, in the formats of diffusers and transformers.

    model_index.json  vae/  text_encoder/  tokenizer/  scheduler/  transformer/  sample.py

The encoders are the files that the model was trained with, byte for byte, so that the folder has their hashes and
`dit_jax.drawing.pipeline.Pipeline` reads it like any export. ``transformer/`` holds the parameters, a config and the
one module of PyTorch that reads them; nothing here is loaded as remote code. ``sample.py`` draws.
"""

import ast
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from dit_jax.encoders import places, taesd
from dit_jax.encoders.joined import JoinedTextModel
from dit_jax.encoders.tokenizer import FILES as TOKENIZER_FILES
from dit_jax.errors import ConfigError
from dit_jax.exchange.schedulers import Scheduler, scheduler_of

if TYPE_CHECKING:
    from dit_jax.encoders import VAE, TextEncoder

PARAMETERS = "transformer/diffusion_pytorch_model.safetensors"
MODULE, SCRIPT = "transformer/dit.py", "sample.py"
SOURCES = {MODULE: places.ASSETS / "torch" / "dit.py", SCRIPT: places.ASSETS / "torch" / "sample.py"}
WRITTEN_FOR = "0.42.1"  # the release of diffusers whose formats these are
STEMS = {"vae": "diffusion_pytorch_model", "text_encoder": "model"}  # of the weights that it looks for


def check(config: ConfigDict, vae: "VAE", text_encoder: "TextEncoder") -> Scheduler:
    """The scheduler of a model that can be written as components.

    Raises:
      ConfigError: a part of it cannot.
    """
    if isinstance(text_encoder.network, JoinedTextModel):
        raise ConfigError(
            f"text_encoder {text_encoder.name} joins several towers, which --format=diffusers does not write;"
            " --format=safetensors exports it for dit_jax"
        )
    for key, known in _computed_in_torch().items():
        if config.model[key] not in known:
            raise ConfigError(
                f"model.{key}={config.model[key]} is not computed by {SOURCES[MODULE]}, which knows {', '.join(known)}:"
                " add it there and to its CHOICES, or --format=safetensors exports it for dit_jax"
            )
    for kind, files in (("vae", vae.files), ("text_encoder", text_encoder.files)):
        expected = re.compile(rf"config\.json|{STEMS[kind]}(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
        for name, path in files.items():
            if name not in TOKENIZER_FILES and not expected.fullmatch(name):
                raise ConfigError(
                    f"{kind}: diffusers does not read {path}; save its weights as {STEMS[kind]}.safetensors, and train"
                    " with that, or --format=safetensors exports it for dit_jax"
                )
    return scheduler_of(config.diffusion, config.sample, config.model.out_channels > config.model.in_channels)


def _computed_in_torch() -> dict[str, tuple[str, ...]]:
    """``CHOICES`` of the module that goes with an export, read without torch."""
    statements = ast.parse(SOURCES[MODULE].read_text(encoding="utf-8")).body
    assigned = [node for node in statements if isinstance(node, ast.Assign)]
    (value,) = (node.value for node in assigned if ast.unparse(node.targets[0]) == "CHOICES")
    return ast.literal_eval(value)


def write(folder: Path, config: ConfigDict, vae: "VAE", text_encoder: "TextEncoder", scheduler: Scheduler) -> None:
    """Write all components but the parameters.

    Args:
      folder: of the export.
      config: resolved, of the run.
      vae, text_encoder: its encoders.
      scheduler: what `check` gave.
    """
    vae.copy_to(folder / "vae")
    tokens = {name: path for name, path in text_encoder.files.items() if name in TOKENIZER_FILES}
    _copy(tokens, folder / "tokenizer")
    _copy({name: path for name, path in text_encoder.files.items() if name not in tokens}, folder / "text_encoder")
    tiny = isinstance(vae.network, taesd.AutoencoderTiny)
    projected = text_encoder.network.projection_dim is not None
    index = {
        "_class_name": "DiffusionPipeline",
        "_diffusers_version": WRITTEN_FOR,
        "vae": ["diffusers", "AutoencoderTiny" if tiny else "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", scheduler.name],
        "transformer": ["dit", "DiT"],
    }
    _write_json(folder / "model_index.json", index)
    stated = {"_class_name": scheduler.name, "_diffusers_version": WRITTEN_FOR, **scheduler.options}
    _write_json(folder / "scheduler" / "scheduler_config.json", stated)
    _write_json(folder / "transformer" / "config.json", _transformer(config, vae, scheduler))
    for name, source in SOURCES.items():
        shutil.copyfile(source, folder / name)


def _transformer(config: ConfigDict, vae: "VAE", scheduler: Scheduler) -> dict[str, Any]:
    """The fields of the module's ``Config``, and what ``sample.py`` must know beside the scheduler."""
    # diffusers counts TAESD's own latents as raw
    unit = taesd.SCALING_FACTOR if isinstance(vae.network, taesd.AutoencoderTiny) else 1.0
    sample = config.sample
    return {
        "_class_name": "DiT",
        **config.model.to_dict(),
        "latents_shift": [shift * unit for shift in config.latents.shift],
        "latents_scale": [scale / unit for scale in config.latents.scale],
        "sampling": {
            "times": scheduler.times,
            "eta": scheduler.eta,
            "grid": sample.grid,
            "steps": sample.steps,
            "guidance_scale": sample.guidance_scale,
            "guidance_interval": list(sample.guidance_interval),
            "image_size": config.data.image_size,
            "pixels_per_latent": vae.factor,
        },
    }


def _copy(files: Mapping[str, Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in files.items():
        shutil.copyfile(path, folder / name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
