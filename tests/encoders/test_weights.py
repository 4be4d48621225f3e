"""Names and layouts translate both ways, and whatever does not fit is refused and named."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import serialization, traverse_util
from safetensors.numpy import load_file, save_file

from dit_jax.encoders import load_text_encoder, load_vae, weights

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def vae_folder(tmp_path: Path) -> Path:
    """A copy of a VAE that a test may spoil."""
    return Path(shutil.copytree(GOLDEN / "vae_plain", tmp_path / "vae"))


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "text_sd1", tmp_path / "text_encoder"))


def rewrite(folder: Path, change) -> None:
    """Applies ``change`` to the dict of tensors of the folder's only weight file."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("case, prefix", [("vae_sd3", weights.VAE_PREFIX), ("text_sdxl2", weights.TEXT_PREFIX)])
def test_to_published_inverts_to_linen(case: str, prefix: str):
    load = load_vae if prefix == weights.VAE_PREFIX else load_text_encoder
    params = load(GOLDEN / case).params
    tensors = weights.to_published(params, prefix)
    jax.tree.map(np.testing.assert_array_equal, weights.to_linen(tensors, params, prefix), params)


def test_exports_have_the_published_names(text_folder: Path):
    (path,) = text_folder.glob("*.safetensors")
    published = load_file(path)
    del published["text_model.embeddings.position_ids"]
    ours = weights.to_published(load_text_encoder(text_folder).params, weights.TEXT_PREFIX)
    assert ours.keys() == published.keys()
    for name, tensor in published.items():
        np.testing.assert_array_equal(ours[name], tensor)


def test_one_error_lists_everything_that_is_wrong(vae_folder: Path):
    def spoil(tensors):
        del tensors["encoder.conv_in.bias"], tensors["quant_conv.weight"]
        tensors["decoder.conv_in.weight"] = tensors["decoder.conv_in.weight"].transpose(1, 0, 2, 3).copy()
        tensors["decoder.conv_in.bias"] = np.zeros(4, np.int64)
        tensors["loss.logvar"] = np.zeros(1, np.float32)
        tensors["encoder.down_blocks.0.resnets.1.conv1.bias"] = np.zeros(4, np.float32)

    # 4 latent channels into 4 is square and would hide the transposition
    config = json.loads((vae_folder / "config.json").read_text())
    (vae_folder / "config.json").write_text(json.dumps({**config, "latent_channels": 3}))
    rewrite(vae_folder, spoil)
    with pytest.raises(ValueError) as error:
        load_vae(vae_folder)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{vae_folder}: the weights do not fit the config:"
    for line in (
        "missing encoder.conv_in.bias (4,)",
        "missing quant_conv.weight (6, 6, 1, 1)",
        "misshapen decoder.conv_in.weight (4, 4, 3, 3), expected (4, 3, 3, 3)",
        "not of a float type: decoder.conv_in.bias is int64",
        "extra encoder.down_blocks.0.resnets.1.conv1.bias (4,)",
        "extra loss.logvar (1,)",
    ):
        assert f"  {line}" in lines


def test_a_layer_more_than_the_config_has_is_refused(text_folder: Path):
    def add_layer(tensors):
        for name in [name for name in tensors if ".layers.1." in name]:
            tensors[name.replace(".layers.1.", ".layers.2.")] = tensors[name]

    rewrite(text_folder, add_layer)
    with pytest.raises(ValueError, match=r"extra text_model\.encoder\.layers\.2\.mlp\.fc1\.weight"):
        load_text_encoder(text_folder)


def test_extras_of_the_other_tower_are_known(text_folder: Path):
    plain = load_text_encoder(text_folder).params

    def add_extras(tensors):
        tensors["logit_scale"] = np.zeros((), np.float32)
        tensors["text_projection.weight"] = tensors["visual_projection.weight"] = np.zeros((2, 2), np.float32)
        tensors["vision_model.post_layernorm.bias"] = np.zeros(2, np.float32)

    rewrite(text_folder, add_extras)
    jax.tree.map(np.testing.assert_array_equal, load_text_encoder(text_folder).params, plain)


def test_shards_are_one_set(vae_folder: Path):
    whole = load_vae(vae_folder)
    (path,) = vae_folder.glob("*.safetensors")
    tensors = load_file(path)
    path.unlink()
    names = sorted(tensors)
    weight_map = {}
    for i in (1, 2):
        file = f"diffusion_pytorch_model-0000{i}-of-00002.safetensors"
        part = {name: tensors[name] for name in names[i - 1 :: 2]}
        save_file(part, vae_folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = vae_folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    sharded = load_vae(vae_folder)
    jax.tree.map(np.testing.assert_array_equal, sharded.params, whole.params)
    assert len(sharded.sha256) == len(whole.sha256) == 64

    (vae_folder / file).unlink()
    with pytest.raises(FileNotFoundError, match="names shards that are not there: .*00002-of-00002"):
        load_vae(vae_folder)


def test_the_hash_is_of_the_file(vae_folder: Path):
    before = load_vae(vae_folder).sha256
    assert before == load_vae(GOLDEN / "vae_plain").sha256

    def nudge(tensors):
        tensors["encoder.conv_in.bias"] += np.float16(1)

    rewrite(vae_folder, nudge)
    assert load_vae(vae_folder).sha256 != before


def test_damaged_files_are_named(vae_folder: Path):
    (path,) = vae_folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{vae_folder}: {path.name} is damaged: "):
        load_vae(vae_folder)
    path.unlink()  # it would go before an index
    index = vae_folder / "diffusion_pytorch_model.safetensors.index.json"
    for text in ("{", "[]", "{}", '{"weight_map": {"a": ["b"]}}'):
        index.write_text(text)
        with pytest.raises(ValueError, match=f"{index} is damaged: "):
            load_vae(vae_folder)


def test_a_half_precision_copy_beside_the_plain_file_is_passed_over(vae_folder: Path):
    (vae_folder / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not read")
    load_vae(vae_folder)


def test_a_plain_file_goes_before_an_index(vae_folder: Path):
    """A folder that was fetched in part: the shards of the index are not there."""
    index = {"weight_map": {"a": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    (vae_folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    load_vae(vae_folder)


def test_shards_without_their_index_are_told_what_is_missing(vae_folder: Path):
    (path,) = vae_folder.glob("*.safetensors")
    for i in (1, 2):
        shutil.copy(path, vae_folder / f"diffusion_pytorch_model-0000{i}-of-00002.safetensors")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="not their index, diffusion_pytorch_model.safetensors.index.json$"):
        load_vae(vae_folder)


def test_safetensors_are_chosen_before_msgpack(vae_folder: Path):
    (vae_folder / "diffusion_flax_model.msgpack").write_bytes(b"not read")
    load_vae(vae_folder)


def test_a_flax_file_holds_the_published_tensors(tmp_path: Path):
    """The same network from both formats; the Flax classes wrote what `to_published` inverts."""
    folder = Path(shutil.copytree(GOLDEN / "flax_vae", tmp_path / "vae"))
    before = load_vae(folder).params
    (path,) = folder.glob("*.msgpack")
    tensors = weights.read_tensors([path])
    assert {tensor.dtype.name for tensor in tensors.values()} == {"bfloat16"}
    save_file(weights.to_published(before, weights.VAE_PREFIX), folder / "diffusion_pytorch_model.safetensors")
    path.unlink()
    jax.tree.map(np.testing.assert_array_equal, load_vae(folder).params, before)


def test_flax_shards_are_one_set(tmp_path: Path):
    folder = Path(shutil.copytree(GOLDEN / "flax_clip", tmp_path / "clip"))
    load_text_encoder(folder)
    shard = sorted(folder.glob("flax_model-*.msgpack"))[-1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"names shards that are not there: ..{shard.name}"):
        load_text_encoder(folder)


def rewrite_msgpack(folder: Path, change) -> None:
    """Applies ``change`` to the flat tree of the folder's only msgpack file."""
    (path,) = folder.glob("*.msgpack")
    leaves = traverse_util.flatten_dict(serialization.msgpack_restore(path.read_bytes()), sep="/")
    change(leaves)
    path.write_bytes(serialization.msgpack_serialize(traverse_util.unflatten_dict(leaves, sep="/")))


def test_one_error_lists_everything_that_is_wrong_with_a_flax_file(tmp_path: Path):
    folder = Path(shutil.copytree(GOLDEN / "flax_text", tmp_path / "clip"))

    def spoil(leaves):
        del leaves["text_model/final_layer_norm/bias"]
        leaves["text_model/encoder/layers/0/mlp/fc1/kernel"] = np.zeros((32, 16), np.float32)
        leaves["text_model/encoder/layers/7/mlp/fc1/bias"] = np.zeros(32, np.float32)

    rewrite_msgpack(folder, spoil)
    with pytest.raises(ValueError) as error:
        load_text_encoder(folder)
    assert str(error.value).splitlines() == [
        f"{folder}: the weights do not fit the config:",
        "  misshapen text_model.encoder.layers.0.mlp.fc1.weight (16, 32), expected (32, 16)",
        "  missing text_model.final_layer_norm.bias (16,)",
        "  extra text_model.encoder.layers.7.mlp.fc1.bias (32,)",
    ]


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:-100],
        lambda whole: whole[:100],
        lambda whole: b"",
        lambda whole: b"\x93\x01\x02\x03",
        lambda whole: b"<html>\n<p>\nnot found",
        lambda whole: whole + whole,
        lambda whole: serialization.msgpack_serialize({"quant_conv": {"kernel": 3}}),
        lambda whole: serialization.msgpack_serialize({"quant_conv": {"kernel": np.zeros((1, 2, 3))}}),
    ],
)
def test_damaged_flax_files_are_named_in_one_line(tmp_path: Path, damage):
    folder = Path(shutil.copytree(GOLDEN / "flax_vae", tmp_path / "vae"))
    (path,) = folder.glob("*.msgpack")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError) as error:
        load_vae(folder)
    assert str(error.value).startswith(f"{folder}: {path.name} is damaged: ")
    assert "\n" not in str(error.value)


def test_weights_of_8_bits_are_refused(vae_folder: Path):
    header = b'{"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}'
    (path,) = vae_folder.glob("*.safetensors")
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match=f"{path.name} has numbers of 8 bits, which are not read: convert it"):
        load_vae(vae_folder)


def test_two_sets_of_weights_are_refused(vae_folder: Path):
    (path,) = vae_folder.glob("*.safetensors")
    shutil.copy(path, vae_folder / "model.safetensors")
    with pytest.raises(ValueError, match="holds several sets of weights, keep one of .*model.safetensors"):
        load_vae(vae_folder)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt", ".pkl"])
def test_pickles_are_refused_with_the_way_to_convert(vae_folder: Path, suffix: str):
    (path,) = vae_folder.glob("*.safetensors")
    path.rename(vae_folder / f"diffusion_pytorch_model{suffix}")
    with pytest.raises(ValueError, match="only pickled weights .* convert them .*save_file.*weights_only=True"):
        load_vae(vae_folder)


def test_a_folder_without_weights_says_so(vae_folder: Path):
    (path,) = vae_folder.glob("*.safetensors")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors or \*\.msgpack in"):
        load_vae(vae_folder)
