"""Golden values of the encoders: tiny networks of the published classes and what they return.

    python tools/make_golden_encoders.py tests/encoders/golden CLIP_TOKENIZER_FOLDER

Needs torch, transformers and diffusers, and the vocabulary of openai/clip-vit-large-patch14. Every case
becomes a folder as it is published: ``config.json``, safetensors with the published names and extras, in
float16, and for text the tokenizer; next to it ``CASE.expected.safetensors`` holds inputs and the outputs of
the published class. The tests read these folders without torch. Where torch is installed they call `build` and
the layouts below themselves, which also tells when a new release of those classes behaves differently.

Weights are random multiples of 1/64 below 4, which float32, float16 and bfloat16 all hold exactly, so that
every copy of a network returns the same numbers.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

VAES: dict[str, dict[str, Any]] = {
    "vae_sd": {
        "block_out_channels": (4, 4, 8),
        "layers_per_block": 2,
        "norm_num_groups": 2,
        "scaling_factor": 0.18215,
    },
    "vae_sd3": {
        "block_out_channels": (4, 8),
        "norm_num_groups": 4,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
    },
    "vae_plain": {"block_out_channels": (4,), "norm_num_groups": 4, "mid_block_add_attention": False},
}

# The number of levels, the depth of each and the widths differ between encoder and decoder where they may.
TINY_VAE = "vae_tiny"
TINY_VAE_CONFIG = {
    "encoder_block_out_channels": (4, 4, 4),
    "decoder_block_out_channels": (6, 6, 6),
    "num_encoder_blocks": (1, 2, 3),
    "num_decoder_blocks": (3, 1, 2),
}
SD_SCALING_FACTOR = 0.18215  # from the raw latents of Stable Diffusion's VAE to those of the tiny one

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "ca", "cat</w>"]
MERGES = ["c a", "ca t</w>"]
BOS, EOS = len(WORDS), len(WORDS) + 1  # the end of text has the largest id, as in CLIP's own vocabulary
TEXT_LENGTH = 12

TEXT = {
    "vocab_size": EOS + 1,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": TEXT_LENGTH,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
    "projection_dim": 12,
}
# By published class and the keys that differ from TEXT. An end of text of 2 is what the oldest configs say.
TEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    "text_sd1": ("CLIPTextModel", {"hidden_act": "quick_gelu", "eos_token_id": 2}),
    "text_sd2": ("CLIPTextModel", {"hidden_act": "gelu", "num_hidden_layers": 3}),
    "text_sdxl2": ("CLIPTextModelWithProjection", {"hidden_act": "gelu", "pad_token_id": 0}),
    "clip": ("CLIPModel", {"hidden_act": "quick_gelu", "eos_token_id": 2}),
}
# SDXL: two towers of different widths, depths and padding, each with its tokenizer, below one folder.
JOINED = "text_sdxl"
JOINED_TOWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "text_encoder": ("CLIPTextModel", {"hidden_act": "quick_gelu", "eos_token_id": 2}),
    "text_encoder_2": (
        "CLIPTextModelWithProjection",
        {"hidden_act": "gelu", "hidden_size": 24, "num_hidden_layers": 3, "pad_token_id": 0, "eos_token_id": 2},
    ),
}
VISION = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "image_size": 16,
    "patch_size": 4,
    "projection_dim": 12,
}


def build(case: str, folder: Path) -> dict[str, np.ndarray]:
    """Makes the network of a case, saves it in ``folder`` as today's release does, and runs it.

    Returns:
      Inputs and outputs, channels-last.
    """
    import torch

    torch.manual_seed(sorted([*VAES, *TEXTS]).index(case))
    network = _vae(case) if case in VAES else _text(*TEXTS[case])
    with torch.no_grad():
        _randomise(network)
        network.save_pretrained(folder)
        if case in VAES:
            return run_vae(network, 4, 6)
        write_tokenizer(folder, "<|endoftext|>")
        return _run_text(case, network)


def build_joined(folder: Path) -> dict[str, np.ndarray]:
    """As `build`, of the folder with the two towers; each reads ids padded in its own way."""
    import torch

    torch.manual_seed(100)
    ids, mask = _captions(TEXT["pad_token_id"])
    hidden = []
    with torch.no_grad():
        for name, tower in JOINED_TOWERS.items():
            network = _text(*tower)
            _randomise(network)
            network.save_pretrained(folder / name)
            pad = {**TEXT, **tower[1]}["pad_token_id"]
            tokenizer = folder / name.replace("text_encoder", "tokenizer")
            tokenizer.mkdir(exist_ok=True)
            write_tokenizer(tokenizer, [*WORDS, "<|startoftext|>", "<|endoftext|>"][pad])
            states = network(torch.from_numpy(np.where(mask, ids, pad)), output_hidden_states=True)
            hidden.append(states.hidden_states[-2].numpy())
    return {
        "ids": ids.astype(np.int32),
        "mask": mask,
        "hidden": np.concatenate(hidden, axis=-1),
        "pooled": states.text_embeds.numpy(),
    }


def build_tiny_vae(folder: Path) -> dict[str, np.ndarray]:
    """As `build`, of the tiny VAE; latents are raw ones, and large enough to be clamped."""
    import torch
    from diffusers import AutoencoderTiny

    torch.manual_seed(101)
    network = AutoencoderTiny(**TINY_VAE_CONFIG)
    factor = 2 ** (len(TINY_VAE_CONFIG["num_encoder_blocks"]) - 1)
    with torch.no_grad():
        _randomise(network)
        network.save_pretrained(folder)
        images = torch.rand(2, 3, 4 * factor, 6 * factor) * 2 - 1
        mean = network.encode(images).latents / SD_SCALING_FACTOR
        latents = 3 * torch.randn(mean.shape) / SD_SCALING_FACTOR
        decoded = network.decode(latents * SD_SCALING_FACTOR).sample
    found = {"images": images, "mean": mean, "latents": latents, "decoded": decoded}
    return {name: _channels_last(value) for name, value in found.items()}


def _randomise(network: Any) -> None:
    """Parameters that float32, float16 and bfloat16 hold exactly; norms are about one."""
    import torch

    for name, parameter in network.eval().named_parameters():
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        values = centre + 0.25 * torch.randn(parameter.shape)
        parameter.copy_((64 * values).round().clip(-255, 255) / 64)


def _channels_last(value: Any) -> np.ndarray:
    return np.ascontiguousarray(value.numpy().transpose(0, 2, 3, 1))


def _vae(case: str) -> Any:
    from diffusers import AutoencoderKL

    levels = len(VAES[case]["block_out_channels"])
    return AutoencoderKL(
        **VAES[case],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    )


def _text(published_class: str, changes: dict[str, Any]) -> Any:
    import transformers

    if published_class == "CLIPModel":
        vision = {**VISION, "hidden_act": changes["hidden_act"]}
        config = transformers.CLIPConfig(
            text_config={**TEXT, **changes}, vision_config=vision, projection_dim=TEXT["projection_dim"]
        )
    else:
        config = transformers.CLIPTextConfig(**{**TEXT, **changes})
    return getattr(transformers, published_class)(config)


def run_vae(network: Any, h: int, w: int) -> dict[str, np.ndarray]:
    """Two pictures of ``h`` x ``w`` latents, their moments, and latents decoded."""
    import torch

    factor = 2 ** (len(network.config.block_out_channels) - 1)
    images = torch.rand(2, 3, h * factor, w * factor) * 2 - 1
    posterior = network.encode(images).latent_dist
    latents = torch.randn(posterior.mean.shape)
    decoded = network.decode(latents).sample
    found = {
        "images": images,
        "mean": posterior.mean,
        "std": posterior.std,
        "latents": latents,
        "decoded": decoded,
    }
    return {name: _channels_last(value) for name, value in found.items()}


def _run_text(case: str, network: Any) -> dict[str, np.ndarray]:
    """Captions of several lengths, padded as the case pads, and their states; for clip a picture too."""
    import torch

    ids, mask = _captions({**TEXT, **TEXTS[case][1]}["pad_token_id"])
    tower = network if case in ("text_sd1", "text_sd2") else network.text_model
    states = tower(torch.from_numpy(ids), output_hidden_states=True)
    pooled = states.pooler_output
    if TEXTS[case][0] == "CLIPTextModelWithProjection":
        pooled = network.text_projection(pooled)
    found = {
        "ids": ids.astype(np.int32),
        "mask": mask,
        "hidden": states.last_hidden_state.numpy(),
        "hidden_before_last": states.hidden_states[-2].numpy(),
        "pooled": pooled.numpy(),
    }
    if case == "clip":
        images = torch.randn(2, 3, VISION["image_size"], VISION["image_size"])
        seen = network.vision_model(images)
        found["images"] = _channels_last(images)
        found["image_hidden"] = seen.last_hidden_state.numpy()
        found["image_pooled"] = network.visual_projection(seen.pooler_output).numpy()
    return found


def _captions(pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Random captions of several lengths, int64, and their mask."""
    import torch

    ids = np.full((4, TEXT_LENGTH), pad, np.int64)
    lengths = np.array([2, 5, 9, TEXT_LENGTH])
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = [BOS, *torch.randint(0, len(WORDS), (length - 2,)).tolist(), EOS]
    return ids, np.arange(TEXT_LENGTH)[None] < lengths[:, None]


def write_tokenizer(folder: Path, pad: str) -> None:
    """The vocabulary of the text cases in the two files that CLIP tokenizers are published in."""
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    special |= {"unk_token": "<|endoftext|>", "pad_token": pad}
    vocabulary = {word: i for i, word in enumerate([*WORDS, special["bos_token"], special["eos_token"]])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8")
    config = {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": TEXT_LENGTH}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


# The layouts in which the same network is found.


def as_published(folder: Path) -> None:
    """Rewrites the names of today's release into those of the published files, with their extras."""
    tensors = {}
    for name, tensor in load_tensors(folder).items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        if name.startswith(("embeddings.", "encoder.layers.", "final_layer_norm.")):
            name = f"text_model.{name}"
        tensors[name] = tensor
    if "text_model.embeddings.token_embedding.weight" in tensors:
        tensors["text_model.embeddings.position_ids"] = np.arange(TEXT_LENGTH)[None]
    if "vision_model.embeddings.class_embedding" in tensors:
        tensors["vision_model.embeddings.position_ids"] = np.arange(17)[None]
    write_tensors(folder, tensors)


def with_convolution_attention(folder: Path) -> None:
    """Turns the linear layers of the VAE's attention into 1 x 1 convolutions."""
    tensors = load_tensors(folder)
    for name, tensor in tensors.items():
        if ".attentions.0." in name and tensor.ndim == 2:
            tensors[name] = tensor[:, :, None, None]
    write_tensors(folder, tensors)


def in_type(folder: Path, dtype: np.dtype) -> None:
    """Casts every tensor of a float type."""
    write_tensors(
        folder,
        {
            name: tensor.astype(dtype) if tensor.dtype == np.float32 else tensor
            for name, tensor in load_tensors(folder).items()
        },
    )


def load_tensors(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of the folder's one safetensors file."""
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def write_tensors(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """Replaces the folder's one safetensors file."""
    (path,) = folder.glob("*.safetensors")
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt"})


PROMPTS = (
    "a photo of a cat",
    "",
    "A  Photo\nof a CAT",
    "a small red circle above a large blue square",
    "an oil painting of a lighthouse, 35mm, f/1.8 (highly detailed)",
    "it's 2024: don't panic!!!",
    "une crème brûlée, naïve café",
    "一只猫的照片",
    "🐱 in a box & a dog <3",
    "supercalifragilisticexpialidocious",
)


def record_prompts(tokenizer: Path, out: Path) -> None:
    """Writes the ids of `PROMPTS` in CLIP's own vocabulary, without padding, and where they come from."""
    import transformers

    clip = transformers.CLIPTokenizerFast.from_pretrained(tokenizer, local_files_only=True)
    rows = [{"prompt": prompt, "ids": clip(prompt)["input_ids"]} for prompt in PROMPTS]
    origin = f"CLIPTokenizerFast of transformers {transformers.__version__}, openai/clip-vit-large-patch14"
    text = json.dumps({"origin": origin, "rows": rows}, ensure_ascii=False, indent=1)
    out.write_text(text + "\n", encoding="utf-8")


def main(out: Path, tokenizer: Path) -> None:
    """Writes every case, and the prompts."""
    record_prompts(tokenizer, out / "clip_prompts.json")
    for case in (*VAES, *TEXTS):
        expected = build(case, out / case)
        as_published(out / case)
        in_type(out / case, np.dtype(np.float16))
        save_file(expected, out / f"{case}.expected.safetensors")
    save_file(build_joined(out / JOINED), out / f"{JOINED}.expected.safetensors")
    save_file(build_tiny_vae(out / TINY_VAE), out / f"{TINY_VAE}.expected.safetensors")
    for name in JOINED_TOWERS:
        as_published(out / JOINED / name)
        in_type(out / JOINED / name, np.dtype(np.float16))
    in_type(out / TINY_VAE, np.dtype(np.float16))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
