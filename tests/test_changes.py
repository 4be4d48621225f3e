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


@each_change
def test_a_change_applies_and_does_what_the_page_says(name, tmp_path):
    for folder in ("dit_jax", "configs"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=block(name, "diff"), text=True, check=True)
    # from a string, so that the modules that are imported are those of the copy
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", block(name, "python")], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout, done.stderr
    assert done.stderr == ""
