"""Wrong input ends in one clear line and its exit code, and loses nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dit_jax import main
from tests.tiny_run import CONFIG, tiny_flags


def fails(capsys, *flags: str) -> tuple[int, str]:
    """Exit code and stderr of the training program."""
    with pytest.raises(SystemExit) as exit:
        main.main(list(flags))
    error = capsys.readouterr().err
    assert "Traceback" not in error and error.count("\n") == 1, error
    return exit.value.code, error


def test_an_unknown_key_names_the_one_that_was_meant(capsys, tmp_path):
    code, error = fails(capsys, *tiny_flags(tmp_path / "run"), "--config.learning_rat=1")
    assert (code, error) == (
        2,
        "config error: unknown key 'learning_rat' (did you mean 'learning_rate'?)\n",
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("total_steps", "many", "total_steps takes an int, not 'many'"),
        ("data.image_size", "100", "data.image_size is 100; it must be a multiple of 16"),
        ("batch_size", "7", "batch_size 7 is not divisible by accumulate 1 x 2 devices"),
        ("model.modulation", "film", "model.modulation is 'film'; it can be adaln, adaln_zero"),
        ("model.in_channels", "5", "model.in_channels is 5"),
        ("diffusion.prediction", "score", "score"),
        ("diffusion.weighting", "snr", "diffusion.weighting is 'snr'; it can be uniform, min_snr, sigmoid"),
        ("diffusion.times", "beta", "diffusion.times is 'beta'; it can be uniform, stratified, logit_normal"),
        ("data.source", "picture:x", "data.source is 'picture:x'; it can be shapes, folder:PATH, jsonl:FILE"),
        ("data.flip", "maybe", "data.flip is 'maybe'; it can be on, off, auto"),
        ("data.crop", "random", "data.crop=random needs data.encode=every_step"),
        ("vae", "./no/such/vae", "'./no/such/vae' is neither 'embedded' nor a local folder (looked for /"),
        ("text_encoder", "./no/such/encoder", "'./no/such/encoder' is neither 'embedded' nor a local folder"),
        ("vae", "sd-vae", "'sd-vae' is neither 'embedded' nor a local folder (looked for /"),
        ("dtype", "float8", "dtype is 'float8'; it can be auto, float32, bfloat16"),
        ("sample.sampler", "magic", "sampler is 'magic'"),
        ("sample.steps", "0", "sample.steps is 0; it must be 1 or more"),
        ("seed", "-1", "-1; it must be in [0, "),
    ],
)
def test_a_value_that_cannot_be_is_refused_before_anything_is_made(capsys, tmp_path, key, value, says):
    code, error = fails(capsys, *tiny_flags(tmp_path / "run"), f"--config.{key}={value}")
    assert code == 2 and says in error, error
    assert not list((tmp_path / "run").glob("*.json*"))


@pytest.mark.parametrize(
    ("key", "files"),
    [("vae", "diffusion_pytorch_model.safetensors"), ("text_encoder", "vocab.json, merges.txt")],
)
def test_a_hub_id_without_a_network_says_how_to_go_on(capsys, tmp_path, key, files):
    """Whatever looks like owner/name is a hub id, where no such folder is at hand."""
    code, error = fails(capsys, *tiny_flags(tmp_path / "run"), f"--config.{key}=no/such")
    assert code == 7 and "no folder no/such here, and the hub id no/such@main cannot be fetched" in error, error
    for way_out in ("unset HF_HUB_OFFLINE", "set HF_ENDPOINT", files, "--config.vae=embedded"):
        assert way_out in error, error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--coordinator=localhost:1234"], "--coordinator, --num_processes and --process_id go together"),
        (["--coordinator=auto", "--process_id=0"], "--coordinator, --num_processes and --process_id go together"),
        (["--coordinator=auto"], "--coordinator=auto finds neither Slurm (srun), Open MPI (mpirun), Kubernetes nor a"),
        (["--num_processes=2", "--process_id=0"], "--coordinator, --num_processes and --process_id go together"),
        (["--coordinator=localhost", "--num_processes=2", "--process_id=0"], "--coordinator is 'localhost'"),
        (
            ["--coordinator=a:1", "--num_processes=2", "--process_id=2"],
            "--process_id=2 of --num_processes=2",
        ),
        (["--coordinator=a:1", "--num_processes=2", "--process_id=0", "--dry_run"], "--dry_run is for one process"),
    ],
)
def test_flags_of_several_processes_that_do_not_fit(capsys, tmp_path, flags, says):
    code, error = fails(capsys, *tiny_flags(tmp_path / "run"), *flags)
    assert code == 2 and says in error, error


def test_a_missing_config_names_the_presets(capsys):
    code, error = fails(capsys, "--config=configs/huge.py")
    assert code == 2 and "no config file configs/huge.py" in error and "configs/quickstart.py" in error


def test_a_missing_folder_and_one_without_captions(capsys, tmp_path):
    flags = tiny_flags(tmp_path / "run", data__source=f"folder:{tmp_path / 'nothing'}")
    code, error = fails(capsys, *flags)
    assert code == 3 and str(tmp_path / "nothing") in error

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (64, 64)).save(pictures / "a.png")
    code, error = fails(capsys, *tiny_flags(tmp_path / "run", data__source=f"folder:{pictures}"))
    assert code == 3 and str(pictures) in error and "metadata.jsonl" in error


def test_a_run_of_another_config_is_refused(capsys, tiny_run):
    code, error = fails(capsys, *tiny_flags(tiny_run), "--config.batch_size=4")
    assert code == 2 and "batch_size: 8 -> 4" in error


def test_overrides_can_be_written_behind_the_config(capsys, tmp_path):
    code, error = fails(capsys, f"--config={CONFIG}:batch_size=64,total_step=3", f"--workdir={tmp_path / 'run'}")
    assert code == 2 and "did you mean 'total_steps'?" in error


def test_the_traceback_is_there_for_who_asks(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main.main([*tiny_flags(tmp_path / "run"), "--config.nonsense=1", "--traceback"])
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.slow
def test_a_cache_that_cannot_be_made_is_no_reason_to_stop(tmp_path):
    (tmp_path / "file").touch()
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-m", "dit_jax.main", f"--config={CONFIG}", "--dry_run", "--device=t4"]
    environment["XDG_CACHE_HOME"] = str(tmp_path / "file")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "warning: nothing that is compiled is kept" in done.stderr, done.stderr


def test_the_home_folder_is_not_a_folder_called_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    main.main(tiny_flags(Path("~/mine"), total_steps="1", sample_every="0"))
    assert (tmp_path / "mine" / "checkpoints" / "1").is_dir() and not (tmp_path / "~").exists()


def test_a_folder_that_is_not_there_is_told_before_anything_is_fetched(capsys, tmp_path):
    flags = tiny_flags(tmp_path / "run", data__source="folder:nowhere", vae="owner/vae", text_encoder="owner/clip")
    code, error = fails(capsys, *flags)
    assert code == 3 and "nowhere" in error
