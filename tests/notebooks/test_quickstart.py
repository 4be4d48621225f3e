"""The notebook runs from top to bottom in a fresh kernel, and its two files are one."""

import os
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
    assert not any(cell.get("outputs") for cell in notebook.cells)  # outputs belong to whoever ran it


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_top_to_bottom(path: Path, tmp_path: Path):
    for name in ("dit_jax", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = os.environ | {"DIT_JAX_FAST": "1", "PYTHONPATH": str(tmp_path)}
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.create_kernel_manager().kernel_spec.argv[0] = sys.executable  # not what "python3" is on this machine
    client.execute(env=environment)
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "done: step 24 of 24" in printed and "same pictures: True" in printed
    shown = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    assert sum("image/png" in output["data"] for output in shown) >= 3  # examples, curve and samples, own prompts
    assert (tmp_path / "exports" / "notebook_fast" / "model.safetensors").is_file()
    assert (tmp_path / "exports" / "notebook_fast.zip").is_file()
