"""The shape of an encoder is known from its config alone, and is that of the encoder itself."""

import json
import shutil
from pathlib import Path

import pytest

from dit_jax.encoders import TextShape, VAEShape, describe_text_encoder, describe_vae, load_text_encoder, load_vae

GOLDEN = Path(__file__).parent / "golden"


def only_config(case: str, folder: Path) -> Path:
    """A folder with the config of a golden case and nothing else."""
    folder.mkdir(parents=True)
    shutil.copy(GOLDEN / case / "config.json", folder)
    return folder


@pytest.mark.parametrize("case", ["vae_sd", "vae_sd3", "vae_plain"])
def test_a_vae(case: str, tmp_path: Path):
    vae = load_vae(GOLDEN / case)
    assert describe_vae(only_config(case, tmp_path / "vae")) == (vae.factor, vae.network.latent_channels)


@pytest.mark.parametrize("case", ["text_sd1", "text_sdxl2", "clip"])
def test_a_text_encoder(case: str, tmp_path: Path):
    text = load_text_encoder(GOLDEN / case)
    found = describe_text_encoder(only_config(case, tmp_path / "text"))
    assert found == (text.length, text.width, text.pooled_width)


def test_embedded():
    assert describe_vae("embedded") == VAEShape(factor=8, channels=4)
    assert describe_text_encoder("embedded") == TextShape(length=32, width=128, pooled_width=128)


def test_a_pipeline_and_a_run_that_names_it(tmp_path: Path):
    only_config("vae_sd", tmp_path / "pipeline" / "vae")
    only_config("text_sd1", tmp_path / "pipeline" / "text_encoder")
    only_config("text_sdxl2", tmp_path / "pipeline" / "text_encoder_2")
    (tmp_path / "run").mkdir()
    names = dict.fromkeys(("vae", "text_encoder"), str(tmp_path / "pipeline"))
    (tmp_path / "run" / "config.json").write_text(json.dumps(names))
    for root in (tmp_path / "pipeline", tmp_path / "run"):
        assert describe_vae(root) == VAEShape(4, 4)
        assert describe_text_encoder(root) == TextShape(12, 16 + 16, 12)


def test_published_networks_are_known_without_fetching(tmp_path: Path):
    for hub_id in (
        "stabilityai/sd-vae-ft-mse",
        "stabilityai/sdxl-vae",
        "stable-diffusion-v1-5/stable-diffusion-v1-5/vae",
    ):
        assert describe_vae(hub_id) == VAEShape(8, 4)
    assert describe_vae("stabilityai/stable-diffusion-3-medium-diffusers/vae@main") == VAEShape(8, 16)
    for hub_id, shape in {
        "openai/clip-vit-large-patch14@main": TextShape(77, 768, 768),
        "stabilityai/stable-diffusion-2-1/text_encoder": TextShape(77, 1024, 1024),
        "stabilityai/stable-diffusion-xl-base-1.0": TextShape(77, 2048, 1280),
        "stabilityai/stable-diffusion-xl-base-1.0/text_encoder": TextShape(77, 768, 768),
    }.items():
        assert describe_text_encoder(hub_id) == shape
    (tmp_path / "config.json").write_text(
        json.dumps({"vae": "embedded", "text_encoder": "openai/clip-vit-base-patch32"})
    )
    assert describe_text_encoder(tmp_path) == TextShape(77, 512, 512)


def test_an_unknown_hub_id_says_what_to_do():
    with pytest.raises(ValueError, match="'nobody/nothing' is no local folder, .*; give a local folder with"):
        describe_vae("nobody/nothing")
    with pytest.raises(
        ValueError, match="'nobody/nothing@main' is no local folder, .*; set model.text_length, .* or give"
    ):
        describe_text_encoder("nobody/nothing@main")


def test_what_the_user_states_is_believed_of_an_unknown_hub_id_alone(tmp_path: Path):
    stated = TextShape(5, 6, 7)
    assert describe_text_encoder("nobody/nothing", stated) == stated
    for known in ("openai/clip-vit-base-patch32", only_config("text_sd1", tmp_path / "text")):
        assert describe_text_encoder(known, stated) == describe_text_encoder(known)


def test_a_hub_id_that_was_fetched_is_read_from_the_cache(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    commit, storage = "0" * 40, tmp_path / "models--nobody--nothing"
    (storage / "refs").mkdir(parents=True)
    (storage / "refs" / "main").write_text(commit)
    only_config("vae_sd3", storage / "snapshots" / commit / "vae")
    only_config("text_sdxl2", storage / "snapshots" / commit / "text" / "deep")
    assert describe_vae("nobody/nothing") == describe_vae("nobody/nothing/vae") == VAEShape(2, 16)
    assert describe_text_encoder(f"nobody/nothing/text/deep@{commit}") == TextShape(12, 16, 12)
