"""The worked changes of docs/changes.md: each is small, applies to the code as it is, and does what the page says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = (REPOSITORY / "docs" / "changes.md").read_text(encoding="utf-8")
MOST_LINES = 30
CHANGES = {section.splitlines()[0]: section for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]}

each_change = pytest.mark.parametrize("name", CHANGES)


def block(name: str, language: str) -> str:
    """The one block of a section in a language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", CHANGES[name], re.MULTILINE | re.DOTALL)
    return found


@each_change
def test_a_change_is_small(name):
    changed = re.findall(r"^(?:\+(?!\+\+ )|-(?!-- ))", block(name, "diff"), re.MULTILINE)
    assert 0 < len(changed) <= MOST_LINES


def apply(name: str, folder: Path, *parts: str) -> dict[str, str]:
    """Apply a change to a copy of the code; the environment in which Python imports the copy."""
    for part in parts:
        shutil.copytree(REPOSITORY / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["git", "apply", "-"], cwd=folder, input=block(name, "diff"), text=True, check=True)
    return {**os.environ, "PYTHONPATH": str(folder)}


@each_change
def test_a_change_applies_and_does_what_the_page_says(name, tmp_path):
    environment = apply(name, tmp_path, "dit_jax", "configs")
    # from a string, so that the modules that are imported are those of the copy
    done = subprocess.run(
        [sys.executable, "-c", block(name, "python")], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout, done.stderr
    assert done.stderr == ""


def test_a_changed_block_leaves_with_an_export(tmp_path):
    """By a line in the options, and the tests that the page names: PyTorch, an export and back, cost, memory."""
    pytest.importorskip("torch")
    environment = apply("Your block", tmp_path, "dit_jax", "configs", "tests", "tools")
    with (tmp_path / "tests" / "models" / "options.py").open("a", encoding="utf-8") as file:
        file.write('\nOPTIONS["relu2"] = {"text_mode": "cross", "mlp": "relu2"}\n')
    files = ["test_torch_dit.py", "exchange/test_layouts.py", "models/test_flops.py", "training/test_memory.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-k", "relu2", *(f"tests/{name}" for name in files)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"^4 passed", done.stdout, re.MULTILINE), done.stdout
