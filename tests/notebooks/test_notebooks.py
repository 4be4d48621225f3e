"""Every notebook runs from top to bottom in a fresh kernel, and its two files are one."""

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Where train_your_pictures ran from top to bottom, undisturbed, and nothing was copied."""
    folder = tmp_path_factory.mktemp("whole")
    pictures_of(folder / "my_pictures")
    printed, pictures = run("train_your_pictures", folder)
    assert "done: step 24 of 24" in printed and "a red wall" in printed and pictures == 3
    assert (folder / "exports" / "my_pictures.zip").is_file()
    return folder


def disturbed(folder: Path, error: type[Exception], when: Callable[[], object], disturb: Callable[[Any], None]) -> str:
    """Run train_your_pictures until it fails, as something is done to its kernel at a moment; what it printed.

    Then all of that machine but what was kept is taken away.
    """
    pictures_of(folder / "my_pictures")
    client = fast("train_your_pictures", folder, {"KEEP = ": "KEEP = 'drive/mine' or "})

    def strike() -> None:
        begin = time.monotonic()
        while not when():
            assert time.monotonic() - begin < 120
            time.sleep(0.001)
        disturb(client.km.provisioner.process)

    with ThreadPoolExecutor(1) as pool:
        struck = pool.submit(strike)
        with pytest.raises(error):
            client.execute(env=os.environ | {"DIT_JAX_FAST": "1", "PYTHONPATH": str(folder)})
        struck.result()
    shutil.rmtree(folder / "runs")
    shutil.rmtree(folder / "caches")
    outputs = [output for cell in client.nb.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def check_it_goes_on(folder: Path, whole: Path, at: int) -> None:
    """A fresh kernel begins with what was kept, a step, and ends as the run that was left alone."""
    printed, _ = run("train_your_pictures", folder, KEEP="drive/mine")
    assert f"resuming from step {at}" in printed and "done: step 24 of 24" in printed and 0 < at < 24
    for name in ("runs/my_pictures/metrics.jsonl", "exports/my_pictures/model.safetensors"):
        assert (whole / name).read_bytes() == (folder / name).read_bytes(), name
    kept, own = (folder / place / "checkpoints" for place in ("drive/mine", "runs/my_pictures"))
    assert steps_of(kept) == steps_of(own) and (folder / "drive" / "my_pictures.zip").is_file()


def test_a_run_on_your_pictures_whose_machine_goes_away_inside_a_save_is_the_same_run(whole: Path, tmp_path: Path):
    """The kernel is killed while a checkpoint is being written; of that machine only what was kept is left."""
    saved, saving = tmp_path / "drive" / "mine" / "checkpoints", tmp_path / "runs" / "my_pictures" / "checkpoints"
    disturbed(
        tmp_path,
        DeadKernelError,
        when=lambda: steps_of(saved) and unfinished(saving),
        disturb=lambda kernel: kernel.kill(),
    )
    check_it_goes_on(tmp_path, whole, at=steps_of(saved)[-1])


def test_a_run_on_your_pictures_that_is_interrupted_is_kept_up_to_that_step(whole: Path, tmp_path: Path):
    """The stop button, between two saves; the machine goes away right after the cell has ended."""
    run_of_it = tmp_path / "runs" / "my_pictures"
    printed = disturbed(
        tmp_path,
        CellExecutionError,
        when=lambda: (run_of_it / "metrics.jsonl").is_file() and (run_of_it / "metrics.jsonl").stat().st_size,
        disturb=lambda kernel: kernel.send_signal(signal.SIGINT),
    )
    kept = tmp_path / "drive" / "mine"
    status = json.loads((kept / "STATUS.json").read_text())
    assert status["state"] == "interrupted" and "done: step" not in printed
    assert steps_of(kept / "checkpoints")[-1] == status["step"] == status["saved"]
    check_it_goes_on(tmp_path, whole, at=status["step"])
