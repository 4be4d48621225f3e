"""What is in the wheel: the package with its embedded encoders, and nothing else of the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dit_jax

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy: setuptools leaves its traces where it works."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ["setup.cfg", "pyproject.toml", "LICENSE", "README.md", "dit_jax", "tests", "configs"]:
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        elif (REPOSITORY / name).is_file():
            shutil.copy(REPOSITORY / name, tree)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    built = tmp_path_factory.mktemp("wheel")
    done = subprocess.run([sys.executable, "-c", build, built], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [path] = built.iterdir()
    return path


def test_the_wheel_holds_the_package_with_its_assets_and_nothing_else(wheel):
    assert wheel.name == f"dit_jax-{dit_jax.__version__}-py3-none-any.whl"
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = (REPOSITORY / "dit_jax").rglob("*")
    wanted = {".py", ".json", ".safetensors", ".txt", ".html"}
    assert packed == {p.relative_to(REPOSITORY).as_posix() for p in sources if p.suffix in wanted}


def test_the_wheel_names_its_licence_and_pythons(wheel):
    with zipfile.ZipFile(wheel) as archive:
        [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = archive.read(metadata).decode().splitlines()
        assert any(name.endswith("/LICENSE") for name in archive.namelist())
    assert "License-Expression: Apache-2.0" in lines
    assert "Requires-Python: <3.15,>=3.11" in lines


def test_from_the_wheel_in_an_empty_folder_a_run_draws(wheel, tiny_run, tmp_path):
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    zipfile.ZipFile(wheel).extractall(installed)
    empty.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "dit_jax.sample", f"--model={tiny_run}", "--prompt=a small red circle"],
        cwd=empty,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (empty / "pictures").iterdir()} == {"00000.png", "grid.png"}
