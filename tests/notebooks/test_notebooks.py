"""Every notebook runs from top to bottom in a fresh kernel, and its two files are one."""

import os
import re
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_both_files_of_a_notebook_hold_the_same_cells(path: Path):
    text, notebook = jupytext.read(path.with_suffix(".py")), jupytext.read(path)
    assert [(cell.cell_type, cell.source) for cell in text.cells] == [
        (cell.cell_type, cell.source) for cell in notebook.cells
    ]
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert set(counts) == {None} or counts == list(range(1, len(counts) + 1))  # outputs are those of one whole run
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)


def run(path: Path, folder: Path) -> tuple[str, int]:
    """What a notebook prints in its fast mode, run in this folder, and how many pictures it shows."""
    for name in ("dit_jax", "configs"):
        (folder / name).symlink_to(ROOT / name)
    environment = os.environ | {"DIT_JAX_FAST": "1", "PYTHONPATH": str(folder)}
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": folder}})
    client.create_kernel_manager().kernel_spec.argv[0] = sys.executable  # not what "python3" is on this machine
    client.execute(env=environment)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    return "".join(output.get("text", "") for output in outputs), pictures


def test_quickstart_trains_draws_and_exports(tmp_path: Path):
    printed, pictures = run(ROOT / "notebooks" / "quickstart.ipynb", tmp_path)
    assert "done: step 24 of 24" in printed and "same pictures: True" in printed
    assert pictures >= 3  # examples, curve and samples, own prompts
    assert (tmp_path / "exports" / "notebook_fast" / "model.safetensors").is_file()
    assert (tmp_path / "exports" / "notebook_fast.zip").is_file()


def test_how_diffusion_works_shows_what_it_says(tmp_path: Path):
    printed, pictures = run(ROOT / "notebooks" / "how_diffusion_works.ipynb", tmp_path)
    assert pictures == 6 and printed.count("agrees: True") == 4
    before, after = map(float, re.search(r"loss (\S+) -> (\S+)", printed).groups())
    assert after < before
    assert len(re.findall(r"^(?:euler|heun|dpmpp_2m|euler_ancestral) .*steps", printed, re.MULTILINE)) == 4
