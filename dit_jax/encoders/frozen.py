"""Encoders as a program uses them: a name or a folder in, a network with its parameters out.

The parameters are an argument of jitted functions, never part of a train state; equal networks share what is compiled.
Batches of any size go through in chunks whose sizes are powers of two up to a bound, so that memory stays bounded and
only a few programs are ever compiled.
"""

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dit_jax.arrays import Array, TextStates
from dit_jax.encoders import networks, places, tiles, weights
from dit_jax.encoders.describe import TextShape, VAEShape
from dit_jax.encoders.latents import LatentScale
from dit_jax.encoders.networks import TextNetwork, VAENetwork
from dit_jax.encoders.tokenizer import LongPrompt, Tokenizer, find_tokenizer, tokenizer_files

CHUNK_PIXELS = 2**20  # pixels of one VAE chunk: 256 pictures of 64 px, 4 of 512 px
CHUNK_CAPTIONS = 256
TILE = 1024  # pixels; pictures with a longer side go through the VAE in tiles of at most this side
TILE_OVERLAP = 256  # pixels, at least


class VAE:
    """A frozen VAE.

    Attributes:
      name: what it was loaded by.
      files: what it was read from, by the names that they have in a copy.
      sha256: of these files.
      network: the linen module.
      params: its parameters, float32.
      factor: f, pixels per latent along a side.
      latent_scale: the map between raw and model latents that came with it.
      shape: what a model must know of it.
    """

    def __init__(
        self,
        name: str,
        files: Mapping[str, Path],
        network: VAENetwork,
        params: Any,
        latent_scale: LatentScale,
    ):
        self.name, self.files, self.sha256 = name, files, weights.sha256(files)
        self.network, self.params = network, params
        self.factor = network.factor
        self.latent_scale = latent_scale
        self.shape = VAEShape(network.factor, network.latent_channels)

    def copy_to(self, folder: Path) -> None:
        """Copies what it was read from to a folder that `load_vae` reads, with the same hash."""
        _copy(self.files, folder)

    def encode(self, images: Array) -> tuple[jax.Array, jax.Array]:
        """Raw moments of pictures.

        A side of more than 1,024 px is encoded in overlapping tiles, whose moments are blended: memory stays
        bounded, and the result is an approximation, as norms and attention see one tile at a time.

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
        return self._tiled(functools.partial(_encode, self.network), images, self.factor, 1)

    def decode(self, latents: Array, dtype: DTypeLike | None = None) -> jax.Array:
        """Raw latents ``[B, h, w, C]`` to float32 pictures ``[B, height, width, 3]``, clipped to [-1, 1].

        A side of more than 1,024 px is decoded in overlapping tiles, which are blended: memory stays bounded,
        and the result is an approximation, as norms and attention see one tile at a time.

        Args:
          latents: of B pictures.
          dtype: compute type, bfloat16 or float32; None is the network's.

        Raises:
          ValueError: the array is no batch of latents, or the type is float16.
        """
        _sides(latents, "latents", self.network.latent_channels)
        network = self.network if dtype is None else self.network.clone(dtype=_checked_dtype(dtype))
        return self._tiled(functools.partial(_decode, network), latents, 1, self.factor)

    def _tiled(self, run: Callable[..., Any], array: Array, in_scale: int, out_scale: int) -> Any:
        """``run(params, array)`` in chunks and, where it is large, in tiles; scales are places per latent."""
        sides = [side // in_scale for side in np.shape(array)[1:3]]
        tile = TILE // self.factor
        h, w = (min(side, tile) for side in sides)
        limit = CHUNK_PIXELS // (h * w * self.factor**2)

        def chunks(rows: Array) -> Any:
            return _in_chunks(functools.partial(run, self.params), (rows,), limit)

        if max(sides) <= tile:
            return chunks(array)
        overlap = TILE_OVERLAP // self.factor
        return jax.device_put(tiles.blend(chunks, array, tile, overlap, in_scale, out_scale))


class TextEncoder:
    """A frozen CLIP text tower, or several joined, with the tokenizer.

    Attributes:
      name: what it was loaded by.
      files: what it was read from, the tokenizer's among them, by the names that they have in a copy.
      sha256: of these files.
      network: the linen module.
      params: its parameters, float32.
      tokenizer: captions to ids.
      length: S.
      width: E.
      pooled_width: P.
      shape: what a model must know of it.
    """

    def __init__(
        self,
        name: str,
        files: Mapping[str, Path],
        network: TextNetwork,
        params: Any,
        tokenizer: Tokenizer,
    ):
        if tokenizer.vocab_size > network.vocab_size:
            raise ValueError(
                f"{name}: the tokenizer has {tokenizer.vocab_size} tokens, the network {network.vocab_size}; "
                "they do not belong together"
            )
        self.name, self.files, self.sha256 = name, files, weights.sha256(files)
        self.network, self.params, self.tokenizer = network, params, tokenizer
        self.length = network.length
        self.width = network.width
        self.pooled_width = network.pooled_width
        self.shape = TextShape(network.length, network.width, network.pooled_width)

    def copy_to(self, folder: Path) -> None:
        """Copies what it was read from to a folder that `load_text_encoder` reads, with the same hash."""
        _copy(self.files, folder)

    def __call__(self, texts: Sequence[str], long_prompt: LongPrompt = "truncate") -> TextStates:
        """Text states of captions; what is too long is treated as ``tokenize`` says."""
        return self.encode_ids(*self.tokenize(texts, long_prompt))

    def tokenize(self, texts: Sequence[str], long_prompt: LongPrompt = "truncate") -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 ``[B, S]`` and mask bool ``[B, S]`` of captions, with ``chunk`` ``[B, pieces * S]``.

        Raises:
          ValueError: a caption is too long and ``long_prompt`` is ``error`` (``truncate`` cuts and warns).
        """
        return self.tokenizer(texts, long_prompt)

    def encode_ids(self, ids: Array, mask: Array) -> TextStates:
        """Text states of tokenized captions.

        Captions in pieces are encoded piece by piece, so that the first piece of each is what it is alone. Hidden
        states and masks of the pieces stand side by side; ``pooled`` is the mean over the pieces that a caption has.

        Args:
          ids: int32 ``[B, S]``, or ``[B, pieces * S]``.
          mask: bool, likewise, true from BOS to EOS of a piece.

        Returns:
          float32 states on the device; ``hidden`` is zero where the mask is false.

        Raises:
          ValueError: the arrays have other shapes.
        """
        pieces = ids.shape[1] // self.length if np.ndim(ids) == 2 else 0
        if not pieces or ids.shape[1] % self.length or np.shape(mask) != ids.shape or not len(ids):
            raise ValueError(
                f"expected ids and mask [B, {self.length}] of at least one caption, or of some in pieces of as many,"
                f" got {np.shape(ids)} and {np.shape(mask)}"
            )
        run = functools.partial(_encode_tokens, self.network, self.params)
        if pieces == 1:
            return _in_chunks(run, (ids, mask), CHUNK_CAPTIONS)
        cuts = [slice(k * self.length, (k + 1) * self.length) for k in range(pieces)]
        arrays = [(ids[:, cut], mask[:, cut]) for cut in cuts]
        return _side_by_side([_in_chunks(run, pair, CHUNK_CAPTIONS) for pair in arrays])


@functools.partial(jax.jit, static_argnums=0)
def _init(network: VAENetwork | TextNetwork, *args: Any) -> Any:
    return network.init(*args)


@functools.partial(jax.jit, static_argnums=0)
def _encode(network: VAENetwork, params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    return network.apply({"params": params}, images, method="encode")


@functools.partial(jax.jit, static_argnums=0)
def _decode(network: VAENetwork, params: Any, latents: jax.Array) -> jax.Array:
    return jnp.clip(network.apply({"params": params}, latents, method="decode"), -1.0, 1.0)


@functools.partial(jax.jit, static_argnums=0)
def _encode_tokens(network: TextNetwork, params: Any, ids: jax.Array, mask: jax.Array) -> TextStates:
    return network.apply({"params": params}, ids, mask)


@jax.jit
def _side_by_side(pieces: Sequence[TextStates]) -> TextStates:
    """The states of captions from those of their pieces; a piece without a token is none."""
    hidden, pooled, mask = (jnp.stack(leaves) for leaves in zip(*pieces, strict=True))  # [pieces, B, ...]
    there = mask.any(2)[:, :, None]
    mean = jnp.where(there, pooled, 0.0).sum(0) / there.sum(0)
    joined = [jnp.concatenate(list(leaf), axis=1) for leaf in (jnp.where(mask[..., None], hidden, 0.0), mask)]
    return TextStates(joined[0], mean, joined[1])


def load_vae(path: str | Path, dtype: DTypeLike = jnp.float32) -> VAE:
    """Loads a VAE.

    Args:
      path: ``embedded``, a folder with the ``config.json`` and the weights of an AutoencoderKL or an
        AutoencoderTiny, a folder with such a subfolder ``vae``, a run, or a hub id.
      dtype: compute type, bfloat16 or float32.

    Raises:
      FileNotFoundError: there is no such folder, or a file is absent.
      ValueError: the folder holds another network, weights that do not fit, or only pickles.
    """
    dtype = _checked_dtype(dtype)
    (folder,) = places.find(path, "vae")
    network, latent_scale = networks.open_vae(folder, dtype)
    key, side = jax.random.key(0), 2 * network.factor
    image = jax.ShapeDtypeStruct((1, side, side, network.in_channels), jnp.float32)
    shapes = _init.eval_shape(network, key, image, key)["params"]
    (params,) = _read_params([folder], [shapes], weights.VAE_PREFIX)
    return VAE(str(path), _by_name(_network_files(folder), ""), network, params, latent_scale)


def load_text_encoder(
    path: str | Path, dtype: DTypeLike = jnp.float32, *, skip_layers: int | None = None, final_norm: bool | None = None
) -> TextEncoder:
    """Loads a CLIP text encoder and its tokenizer.

    Args:
      path: ``embedded``, or a folder with ``config.json`` and weights of a CLIPTextModel (with or without
        projection) or a whole CLIPModel, whose text tower is taken; the tokenizer is in the same folder or
        in the sibling ``tokenizer*``. Or a folder with the subfolder ``text_encoder``, and perhaps ``text_encoder_2``,
        which is then joined to it (SDXL), a run, or a hub id.
      dtype: compute type.
      skip_layers: how many of the last blocks ``hidden`` leaves out; None is 0, or 1 where towers are joined.
      final_norm: whether the final norm is applied to ``hidden``; None is true, or false where towers are joined.

    Raises:
      FileNotFoundError: there is no such folder, or a file is absent.
      ValueError: a folder holds another network, weights that do not fit, or only pickles, or two towers
        do not belong together.
    """
    folders = places.find(path, "text_encoder")
    network = networks.open_text(folders, skip_layers, final_norm, dtype)
    tokenizer_folders = [find_tokenizer(folder) for folder in folders]
    tokenizer, *others = (Tokenizer(folder, network.length) for folder in tokenizer_folders)
    for other, folder in zip(others, tokenizer_folders[1:], strict=True):
        if not tokenizer.has_tokens_of(other):
            raise ValueError(f"the tokenizers in {tokenizer_folders[0]} and {folder} differ; one must serve all towers")
    ids = jax.ShapeDtypeStruct((1, network.length), jnp.int32)
    mask = jax.ShapeDtypeStruct(ids.shape, bool)
    shapes = _init.eval_shape(network, jax.random.key(0), ids, mask)["params"]
    if len(folders) == 1:
        (params,) = _read_params(folders, [shapes], weights.TEXT_PREFIX)
        files = _by_name([*_network_files(folders[0]), *tokenizer_files(tokenizer_folders[0])], "")
    else:
        params = dict(zip(shapes, _read_params(folders, list(shapes.values()), weights.TEXT_PREFIX), strict=True))
        files = {}
        for folder in folders:
            files |= _by_name(_network_files(folder), f"{folder.name}/")
        for folder in tokenizer_folders:
            files |= _by_name(tokenizer_files(folder), f"{folder.name}/")
    return TextEncoder(str(path), files, network, params, tokenizer)


def _checked_dtype(dtype: DTypeLike) -> DTypeLike:
    """The compute type of a VAE, once it is seen that it can be."""
    if jnp.dtype(dtype) == jnp.float16:
        raise ValueError("dtype float16 overflows in VAE decoders (black pictures); valid: bfloat16, float32")
    return dtype


def _network_files(folder: Path) -> list[Path]:
    """What a network is read from: another content is another network."""
    return [folder / "config.json", *weights.weight_files(folder)]


def _by_name(paths: list[Path], home: str) -> dict[str, Path]:
    """Files by the names that they have below the folder that a copy would be loaded from."""
    return {home + path.name: path for path in paths}


def _copy(files: Mapping[str, Path], folder: Path) -> None:
    for name, path in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)


def _read_params(folders: Sequence[Path], shapes: Sequence[Any], prefix: str) -> list[Any]:
    """The parameters of each folder's network, on the device; one error lists what is wrong with all."""
    params, wrong = [], []
    for folder, tree in zip(folders, shapes, strict=True):
        try:
            params.append(weights.to_linen(weights.read_tensors(weights.weight_files(folder)), tree, prefix))
        except ValueError as error:
            wrong.append(f"{folder}: {error}")
    if wrong:
        raise ValueError("\n".join(wrong))
    return jax.device_put(params)


def _sides(array: Array, what: str, channels: int) -> tuple[int, int]:
    """Height and width of a channels-last batch, once its shape is seen to be right."""
    shape = np.shape(array)
    if len(shape) != 4 or shape[-1] != channels or not shape[0]:
        raise ValueError(f"expected {what} of shape [B, height, width, {channels}], got {shape}")
    return shape[1], shape[2]


def _in_chunks(run: Callable[..., Any], arrays: tuple[Array, ...], limit: int) -> Any:
    """``run(*arrays)`` over at most ``limit`` rows at a time, padded to a power of two.

    Cutting and padding happen on the host, where they compile nothing; a batch that needs neither stays
    where it is.
    """
    limit = 1 << max(limit, 1).bit_length() - 1
    total = len(arrays[0])
    if total <= limit and total == _power_of_two_above(total):
        return run(*jax.device_put(arrays))
    arrays = jax.device_get(arrays)
    parts = []
    for start in range(0, total, limit):
        rows = [array[start : start + limit] for array in arrays]
        count = len(rows[0])
        missing = _power_of_two_above(count) - count
        padded = [np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)) for array in rows]
        parts.append(_first_rows(run(*jax.device_put(padded)), count))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def _power_of_two_above(count: int) -> int:
    """The smallest power of two that is not below ``count``."""
    return 1 << (count - 1).bit_length()


@functools.partial(jax.jit, static_argnums=1)
def _first_rows(tree: Any, count: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[:count], tree)
