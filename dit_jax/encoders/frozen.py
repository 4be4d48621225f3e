"""Encoders as a program uses them: a name or a folder in, a network with its parameters out.

The parameters are an argument of each object's own jitted functions, never part of a train state. Batches
of any size go through in chunks whose sizes are powers of two up to a bound, so that memory stays
bounded and only a few programs are ever compiled.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dit_jax.arrays import Array, TextStates
from dit_jax.encoders import networks, weights
from dit_jax.encoders.clip import CLIPTextModel
from dit_jax.encoders.latents import scale_from_factors
from dit_jax.encoders.tokenizer import LongPrompt, Tokenizer, find_tokenizer, tokenizer_files
from dit_jax.encoders.vae import AutoencoderKL

EMBEDDED = "embedded"
ASSETS = Path(__file__).parent.parent / "assets"

CHUNK_PIXELS = 2**20  # pixels of one VAE chunk: 256 pictures of 64 px, 4 of 512 px
CHUNK_CAPTIONS = 256


class VAE:
    """A frozen VAE.

    Attributes:
      name: what it was loaded by.
      sha256: of ``config.json`` and the weight files.
      config: the published config, absent keys filled in.
      network: the linen module.
      params: its parameters, float32.
      factor: f, pixels per latent along a side.
      latent_scale: the map between raw and model latents that the config states.
    """

    def __init__(self, name: str, sha256: str, config: networks.Config, network: AutoencoderKL, params: Any):
        self.name, self.sha256, self.config = name, sha256, config
        self.network, self.params = network, params
        self.factor = 2 ** (len(network.block_out_channels) - 1)
        self.latent_scale = scale_from_factors(
            config["scaling_factor"], config["shift_factor"], network.latent_channels
        )
        self._encode = jax.jit(lambda params, x: network.apply({"params": params}, x, method="encode"))
        self._decode = jax.jit(
            lambda params, x: jnp.clip(network.apply({"params": params}, x, method="decode"), -1.0, 1.0)
        )

    def encode(self, images: Array) -> tuple[jax.Array, jax.Array]:
        """Raw moments of pictures.

        Args:
          images: ``[B, height, width, 3]`` in [-1, 1].

        Returns:
          mean and std, float32 ``[B, h, w, C]``.

        Raises:
          ValueError: the array is no batch of pictures, or f does not divide a side.
        """
        height, width = _sides(images, "pictures", self.network.in_channels)
        if height % self.factor or width % self.factor:
            raise ValueError(f"pictures of {height} x {width} px: the VAE needs multiples of {self.factor}")
        return _in_chunks(self._encode, self.params, (images,), CHUNK_PIXELS // (height * width))

    def decode(self, latents: Array) -> jax.Array:
        """Raw latents ``[B, h, w, C]`` to float32 pictures ``[B, height, width, 3]``, clipped to [-1, 1].

        Raises:
          ValueError: the array is no batch of latents.
        """
        h, w = _sides(latents, "latents", self.network.latent_channels)
        return _in_chunks(self._decode, self.params, (latents,), CHUNK_PIXELS // (h * w * self.factor**2))


class TextEncoder:
    """A frozen CLIP text tower with its tokenizer.

    Attributes:
      name: what it was loaded by.
      sha256: of ``config.json``, the weight files and those of the tokenizer.
      network: the linen module.
      params: its parameters, float32.
      tokenizer: captions to ids.
      length: S.
      width: E.
      pooled_width: P.
    """

    def __init__(self, name: str, sha256: str, network: CLIPTextModel, params: Any, tokenizer: Tokenizer):
        if tokenizer.vocab_size > network.vocab_size:
            raise ValueError(
                f"{name}: the tokenizer has {tokenizer.vocab_size} tokens, the network {network.vocab_size}; "
                "they do not belong together"
            )
        self.name, self.sha256 = name, sha256
        self.network, self.params, self.tokenizer = network, params, tokenizer
        self.length = network.max_position_embeddings
        self.width = network.hidden_size
        self.pooled_width = network.projection_dim or network.hidden_size
        self._encode = jax.jit(lambda params, ids, mask: network.apply({"params": params}, ids, mask))

    def __call__(self, texts: Sequence[str], long_prompt: LongPrompt = "truncate") -> TextStates:
        """Text states of captions; what is too long is cut as ``tokenize`` says."""
        return self.encode_ids(*self.tokenize(texts, long_prompt))

    def tokenize(self, texts: Sequence[str], long_prompt: LongPrompt = "truncate") -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 ``[B, S]`` and mask bool ``[B, S]`` of captions.

        Raises:
          ValueError: a caption is too long and ``long_prompt`` is ``error`` (``truncate`` cuts and warns).
        """
        return self.tokenizer(texts, long_prompt)

    def encode_ids(self, ids: Array, mask: Array) -> TextStates:
        """Text states of tokenized captions.

        Args:
          ids: int32 ``[B, S]``.
          mask: bool ``[B, S]``, true from BOS to EOS.

        Returns:
          float32 states on the device; ``hidden`` is zero where the mask is false.

        Raises:
          ValueError: the arrays have other shapes.
        """
        if np.ndim(ids) != 2 or ids.shape[1] != self.length or np.shape(mask) != ids.shape or not len(ids):
            raise ValueError(
                f"expected ids and mask [B, {self.length}] of at least one caption, "
                f"got {np.shape(ids)} and {np.shape(mask)}"
            )
        return _in_chunks(self._encode, self.params, (ids, mask), CHUNK_CAPTIONS)


def load_vae(path: str | Path, dtype: DTypeLike = jnp.float32) -> VAE:
    """Loads a VAE.

    Args:
      path: ``embedded``, or a folder with an AutoencoderKL ``config.json`` and safetensors.
      dtype: compute type, bfloat16 or float32.

    Raises:
      FileNotFoundError: there is no such folder, or a file is absent.
      ValueError: the folder holds another network, weights that do not fit, or only pickles.
    """
    if jnp.dtype(dtype) == jnp.float16:
        raise ValueError("dtype float16 overflows in VAE decoders (black pictures); valid: bfloat16, float32")
    folder = _folder(path, "tiny_vae", "vae")
    config = networks.read_config(folder)
    network = networks.vae_network(config, dtype=dtype)
    key, side = jax.random.key(0), 2 ** len(network.block_out_channels)
    image = jax.ShapeDtypeStruct((1, side, side, network.in_channels), jnp.float32)
    shapes = jax.eval_shape(network.init, key, image, key)["params"]
    params, files = _read_params(folder, shapes, weights.VAE_PREFIX)
    sha256 = weights.sha256([folder / "config.json", *files])
    config = {**networks.VAE_DEFAULTS, **networks.LATENT_DEFAULTS, **config}
    return VAE(str(path), sha256, config, network, params)


def load_text_encoder(
    path: str | Path, dtype: DTypeLike = jnp.float32, *, skip_layers: int = 0, final_norm: bool = True
) -> TextEncoder:
    """Loads a CLIP text encoder and its tokenizer.

    Args:
      path: ``embedded``, or a folder with ``config.json`` and safetensors of a CLIPTextModel (with or
        without projection) or a whole CLIPModel, whose text tower is taken; the tokenizer is in the same
        folder or in the sibling ``tokenizer*``.
      dtype: compute type.
      skip_layers: how many of the last blocks ``hidden`` leaves out (SDXL: 1).
      final_norm: whether the final norm is applied to ``hidden`` (SDXL: False).

    Raises:
      FileNotFoundError: there is no such folder, or a file is absent.
      ValueError: the folder holds another network, weights that do not fit, or only pickles.
    """
    folder = _folder(path, "tiny_clip", "text_encoder")
    config = networks.read_config(folder)
    network = networks.text_network(
        config,
        project=networks.is_projected(config),
        skip_layers=skip_layers,
        final_norm=final_norm,
        dtype=dtype,
    )
    tokenizer_folder = find_tokenizer(folder)
    tokenizer = Tokenizer(tokenizer_folder, network.max_position_embeddings)
    ids = jax.ShapeDtypeStruct((1, network.max_position_embeddings), jnp.int32)
    mask = jax.ShapeDtypeStruct(ids.shape, bool)
    shapes = jax.eval_shape(network.init, jax.random.key(0), ids, mask)["params"]
    params, files = _read_params(folder, shapes, weights.TEXT_PREFIX)
    sha256 = weights.sha256([folder / "config.json", *files, *tokenizer_files(tokenizer_folder)])
    return TextEncoder(str(path), sha256, network, params, tokenizer)


def _folder(path: str | Path, asset: str, subfolder: str) -> Path:
    """The folder that the user's word stands for."""
    folder = ASSETS / asset if str(path) == EMBEDDED else Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{str(path)!r} is neither {EMBEDDED!r} nor a local folder (looked for {folder.absolute()})"
        )
    if not (folder / "config.json").is_file() and (folder / subfolder).is_dir():
        raise FileNotFoundError(f"no config.json in {folder}; did you mean {folder / subfolder}?")
    return folder


def _read_params(folder: Path, shapes: Any, prefix: str) -> tuple[Any, list[Path]]:
    """The parameters of a folder, on the device, and the files that they are in."""
    files = weights.weight_files(folder)
    try:
        params = weights.to_linen(weights.read_tensors(files), shapes, prefix)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return jax.device_put(params), files


def _sides(array: Array, what: str, channels: int) -> tuple[int, int]:
    """Height and width of a channels-last batch, once its shape is seen to be right."""
    shape = np.shape(array)
    if len(shape) != 4 or shape[-1] != channels or not shape[0]:
        raise ValueError(f"expected {what} of shape [B, height, width, {channels}], got {shape}")
    return shape[1], shape[2]


def _in_chunks(run: Callable[..., Any], params: Any, arrays: tuple[Array, ...], limit: int) -> Any:
    """``run(params, *arrays)`` over at most ``limit`` rows at a time, padded to a power of two.

    Cutting and padding happen on the host, where they compile nothing; a batch that needs neither stays
    where it is.
    """
    limit = 1 << max(limit, 1).bit_length() - 1
    total = len(arrays[0])
    if total <= limit and total == _power_of_two_above(total):
        return run(params, *jax.device_put(arrays))
    arrays = jax.device_get(arrays)
    parts = []
    for start in range(0, total, limit):
        rows = [array[start : start + limit] for array in arrays]
        count = len(rows[0])
        missing = _power_of_two_above(count) - count
        padded = [np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)) for array in rows]
        parts.append(_first_rows(run(params, *jax.device_put(padded)), count))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def _power_of_two_above(count: int) -> int:
    """The smallest power of two that is not below ``count``."""
    return 1 << (count - 1).bit_length()


@functools.partial(jax.jit, static_argnums=1)
def _first_rows(tree: Any, count: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[:count], tree)
