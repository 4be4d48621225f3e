"""Every notebook runs from top to bottom in a fresh kernel, and its two files are one."""

import os
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from PIL import Image

from dit_jax.training.saved_steps import steps_of, unfinished

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


def fast(name: str, folder: Path, changes: dict[str, str]) -> NotebookClient:
    """A notebook that is to be run in its fast mode in this folder; ``changes``: what a user would set in it."""
    for part in ("dit_jax", "configs"):
        if not (folder / part).exists():
            (folder / part).symlink_to(ROOT / part)
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    for old, new in changes.items():
        (cell,) = [cell for cell in notebook.cells if old in cell.source]
        cell.source = cell.source.replace(old, new)
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": folder}})
    client.create_kernel_manager().kernel_spec.argv[0] = sys.executable  # not what "python3" is on this machine
    return client


def run(name: str, folder: Path, **changes: str) -> tuple[str, int]:
    """What a notebook prints from top to bottom in a fresh kernel, and how many pictures it shows."""
    client = fast(name, folder, {f"{key} = ": f"{key} = {value!r} or " for key, value in changes.items()})
    client.execute(env=os.environ | {"DIT_JAX_FAST": "1", "PYTHONPATH": str(folder)})
    outputs = [output for cell in client.nb.cells for output in cell.get("outputs", [])]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    return "".join(output.get("text", "") for output in outputs), pictures


def test_quickstart_trains_draws_and_exports(tmp_path: Path):
    printed, pictures = run("quickstart", tmp_path)
    assert "done: step 24 of 24" in printed and "same pictures: True" in printed
    assert pictures >= 3  # examples, curve and samples, own prompts
    assert (tmp_path / "exports" / "notebook_fast" / "model.safetensors").is_file()
    assert (tmp_path / "exports" / "notebook_fast.zip").is_file()


def test_how_diffusion_works_shows_what_it_says(tmp_path: Path):
    printed, pictures = run("how_diffusion_works", tmp_path)
    assert pictures == 6 and printed.count("agrees: True") == 4
    before, after = map(float, re.search(r"loss (\S+) -> (\S+)", printed).groups())
    assert after < before
    assert len(re.findall(r"^(?:euler|heun|dpmpp_2m|euler_ancestral) .*steps", printed, re.MULTILINE)) == 4


def test_explore_a_model_turns_every_knob(tiny_run: Path, tmp_path: Path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(tiny_run)
    printed, pictures = run("explore_a_model", tmp_path)
    assert pictures == 6 and "step 20 of a run that draws 64 px" in printed
    assert "guidance 4: " in printed and "dpmpp_2m: 2 evaluations " in printed
    assert "the ends are those of the captions: True" in printed


def pictures_of(folder: Path) -> Path:
    """As a phone has them, captions beside them."""
    folder.mkdir()
    for i, colour in enumerate(("red", "green", "blue", "white", "black", "yellow")):
        Image.new("RGB", (80, 64 + i), colour).save(folder / f"IMG_{i:04}.jpg")
        (folder / f"IMG_{i:04}.txt").write_text(f"a {colour} wall")
    return folder


def test_a_run_on_your_pictures_whose_machine_goes_away_inside_a_save_is_the_same_run(tmp_path: Path):
    """The kernel is killed while a checkpoint is being written; of that machine only what was kept is left."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        pictures_of(folder / "my_pictures")
    printed, pictures = run("train_your_pictures", whole)
    assert "done: step 24 of 24" in printed and "a red wall" in printed and pictures == 3
    assert (whole / "exports" / "my_pictures.zip").is_file()

    client = fast("train_your_pictures", killed, {"KEEP = ": "KEEP = 'drive/mine' or "})
    environment = os.environ | {"DIT_JAX_FAST": "1", "PYTHONPATH": str(killed)}
    saved, saving = killed / "drive" / "mine" / "checkpoints", killed / "runs" / "my_pictures" / "checkpoints"

    def kill_inside_a_save() -> None:
        begin = time.monotonic()
        while not (steps_of(saved) and unfinished(saving)):
            assert time.monotonic() - begin < 120
            time.sleep(0.001)
        os.kill(client.km.provisioner.process.pid, signal.SIGKILL)

    with ThreadPoolExecutor(1) as pool:
        death = pool.submit(kill_inside_a_save)
        with pytest.raises(DeadKernelError):
            client.execute(env=environment)
        death.result()
    shutil.rmtree(killed / "runs")
    shutil.rmtree(killed / "caches")
    (at,) = steps_of(saved)[-1:]
    printed, _ = run("train_your_pictures", killed, KEEP="drive/mine")
    assert f"resuming from step {at}" in printed and "done: step 24 of 24" in printed and 0 < at < 24

    for name in ("runs/my_pictures/metrics.jsonl", "exports/my_pictures/model.safetensors"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
    assert steps_of(saved) == steps_of(saving) and (killed / "drive" / "my_pictures.zip").is_file()
