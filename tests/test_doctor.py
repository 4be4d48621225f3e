"""Doctor: a page that works with nothing there, and runs whose checkpoints are listed and verified."""

import json
import shutil

import pytest

from dit_jax import doctor
from tests.training.test_checkpoint import flip


def lines(capsys, *flags: str) -> list[str]:
    doctor.main(flags)
    return capsys.readouterr().out.splitlines()


def test_the_page_works_with_nothing_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "nothing"))
    monkeypatch.setenv("PATH", "")  # neither git nor nvidia-smi
    said = dict(line.split(maxsplit=1) for line in lines(capsys))
    assert said["devices"] == "2 x cpu" and "0.1.0 (no git)" in said["dit_jax"] and "jax " in said["packages"]
    assert said["compile"] == f"cache  {tmp_path / 'nothing'}, not made yet"
    assert not (tmp_path / "nothing").exists()


def test_a_compile_cache_that_others_can_write_to_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    for mode, told in ((0o700, False), (0o722, True)):
        tmp_path.chmod(mode)
        (line,) = [line for line in lines(capsys) if line.startswith("compile cache")]
        assert f"mode {mode:04o}" in line and ("chmod 700" in line) == told


@pytest.mark.parametrize("error", [None, RuntimeError("Unable to initialize backend 'cuda'\nmore")])
def test_a_gpu_that_jax_does_not_see_is_told_with_what_to_install(error, monkeypatch, capsys):
    def fail():
        raise error

    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr("dit_jax.runtime.nvidia_driver", lambda: "580.65")
    if error:
        monkeypatch.setattr("jax.devices", fail)
    (line,) = [line for line in lines(capsys) if line.startswith("devices")]
    told = "JAX cannot start: Unable to initialize backend 'cuda'" if error else "pip install '.[cuda13]'"
    assert told in line


def test_checkpoints_are_listed_oldest_first_with_what_is_known_of_them(tiny_run, tmp_path, capsys):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 10, "validation_x0_error": 0.25}) + '\n{"step": 20, "lo')
    (run / "checkpoints" / "15" / "ema" / "_METADATA").unlink()
    (run / "checkpoints" / "20").rename(run / "checkpoints" / "20.corrupt")
    head, *rows, last = lines(capsys, f"--list={run}")
    assert last == f"compared were sizes; --verify={run} hashes every file"
    assert head.split() == ["step", "MiB", "loss", "validation", "files"]
    rows = [row.split(maxsplit=4) for row in rows]
    assert [row[0] for row in rows] == ["5", "10", "15", "20.corrupt"]
    losses = {
        row["step"]: row["loss"] for row in map(json.loads, (tiny_run / "metrics.jsonl").read_text().splitlines())
    }
    assert rows[0][2:] == [f"{losses[3]:.4f}", "-", "all there"]
    assert rows[1][2:] == [f"{losses[9]:.4f}", "0.2500", "all there, the best by validation"]
    assert rows[2][2:] == [f"{losses[15]:.4f}", "0.2500", "ema/_METADATA is missing"]


def test_verifying_names_the_file_and_exits_5(tiny_run, tmp_path, capsys):
    assert all(" is what was written: " in line for line in lines(capsys, f"--verify={tiny_run}"))
    run = shutil.copytree(tiny_run, tmp_path / "run")
    flip(run / "checkpoints" / "10" / "optimizer" / "manifest.ocdbt")
    with pytest.raises(SystemExit) as exit:
        doctor.main([f"--verify={run}"])
    said = capsys.readouterr()
    assert exit.value.code == 5
    assert "step 10: optimizer/manifest.ocdbt has another sha256 than it was written with" in said.out.splitlines()
    assert said.err.startswith("checkpoint error: 1 of 4 checkpoints in ") and "are damaged: 10;" in said.err
    with pytest.raises(SystemExit) as exit:
        doctor.main([f"--verify={tmp_path}"])
    assert exit.value.code == 5 and "no checkpoint in " in capsys.readouterr().err
