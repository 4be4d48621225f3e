"""What a user may write for an encoder, and which folders it stands for."""

import json
from pathlib import Path

import pytest

from dit_jax.encoders import places


def make(root: Path, *folders: str) -> Path:
    """Folders below ``root``, each with a ``config.json``."""
    for name in folders:
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "config.json").write_text("{}")
    return root


def run(folder: Path, vae: str, text_encoder: str) -> Path:
    """A run's folder, as far as its encoders go."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"vae": vae, "text_encoder": text_encoder, "seed": 0}))
    return folder


def test_the_embedded_ones_ship_with_the_package():
    for kind in ("vae", "text_encoder"):
        (folder,) = places.find("embedded", kind)
        assert folder.parent == places.ASSETS and (folder / "config.json").is_file()


def test_a_folder_is_itself(tmp_path: Path):
    make(tmp_path, "big")
    assert places.find(tmp_path / "big", "vae") == places.find(str(tmp_path / "big"), "text_encoder")
    assert places.find(tmp_path / "big", "vae") == [tmp_path / "big"]


def test_a_pipeline_has_a_subfolder_for_each(tmp_path: Path):
    root = make(tmp_path, "vae", "text_encoder", "unet")
    assert places.find(root, "vae") == [root / "vae"]
    assert places.find(root, "text_encoder") == [root / "text_encoder"]
    make(root, "text_encoder_2")
    assert places.find(root, "text_encoder") == [root / "text_encoder", root / "text_encoder_2"]
    assert places.find(root / "text_encoder_2", "text_encoder") == [root / "text_encoder_2"]


def test_a_run_stands_for_the_encoders_that_it_names(tmp_path: Path):
    big = make(tmp_path, "big") / "big"
    one = run(tmp_path / "one", str(big), "embedded")
    two = run(tmp_path / "two", str(one), str(one))
    assert places.find(two, "vae") == [big]
    assert places.find(two, "text_encoder") == places.find("embedded", "text_encoder")


def test_an_exported_run_may_hold_one_encoder_and_name_the_other(tmp_path: Path):
    export = make(run(tmp_path / "export", "somewhere/else", "embedded"), "vae")
    assert places.find(export, "vae") == [export / "vae"]
    assert places.find(export, "text_encoder") == places.find("embedded", "text_encoder")


def test_an_exported_run_may_hold_joined_text_encoders(tmp_path: Path):
    export = make(run(tmp_path, "embedded", "gone"), "text_encoder/text_encoder", "text_encoder/text_encoder_2")
    inner = export / "text_encoder"
    assert places.find(export, "text_encoder") == [inner / "text_encoder", inner / "text_encoder_2"]


def test_runs_that_name_each_other_are_refused(tmp_path: Path):
    one, two = tmp_path / "one", tmp_path / "two"
    run(one, str(two), "embedded")
    run(two, str(one), "embedded")
    with pytest.raises(ValueError, match="names as its vae a run that names it again: .* -> .* -> "):
        places.find(one, "vae")


@pytest.mark.parametrize("name", ["nothing", "./runs/x", "/no/such/folder", "../vae", "~/no such", "a//b", "a/b@"])
def test_what_is_neither_a_folder_nor_a_hub_id_says_what_was_looked_for(name: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        places.find(name, "vae")
    folder = Path(name).expanduser().absolute()
    assert str(error.value) == f"{name!r} is neither 'embedded' nor a local folder (looked for {folder})"


@pytest.mark.parametrize("kind", ["vae", "text_encoder"])
def test_a_folder_without_configs_is_named(kind: str, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=f"no config.json in {tmp_path}, and no {kind}/config.json"):
        places.find(tmp_path, kind)


def test_a_damaged_config_of_a_run_is_named(tmp_path: Path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=f"{tmp_path / 'config.json'} is damaged: "):
        places.find(tmp_path, "vae")


def test_a_name_below_a_folder_that_is_here_is_not_looked_for_on_a_hub(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert places.is_hub_id("weights/vae")
    (tmp_path / "weights").mkdir()
    assert not places.is_hub_id("weights/vae")
    said = "'weights/vae' is neither 'embedded' nor a local folder .*; a folder 'weights' lies here, so it is not"
    with pytest.raises(FileNotFoundError, match=said):
        places.find("weights/vae", "vae")


@pytest.mark.parametrize("owner", places.OWN_FOLDERS)
def test_where_programs_write_is_no_owner_on_a_hub(owner: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not places.is_hub_id(f"{owner}/mine")
    with pytest.raises(FileNotFoundError, match=f"looked for {tmp_path / owner / 'mine'}.$"):
        places.find(f"{owner}/mine", "text_encoder")
