"""The machines that tests of the launch scripts run on, and a whole quickstart, shortened."""

import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.launch.stand_ins import READY_PYTHON, Machine

SHORT = [
    "--config.total_steps=4",
    "--config.batch_size=8",
    "--config.log_every=2",
    "--config.sample_every=0",
    "--config.data.num_pictures=64",
    "--config.model.hidden_size=64",
    "--config.model.num_layers=1",
    "--config.model.num_heads=1",
    "--config.sample.steps=2",
]

# Put before everything else on Python's path: whoever asks for a network is told off.
NO_NETWORK = """
import socket

def connect(self, address):
    raise OSError(f"a program of the quickstart asked for {address}")

socket.socket.connect = connect
"""


class ShortRun(NamedTuple):
    """A machine on which ``script()`` runs the whole quickstart into ``workdir``, and how that went at first."""

    machine: Machine
    workdir: Path
    first: subprocess.CompletedProcess[str]

    def script(self) -> subprocess.CompletedProcess[str]:
        return _quickstart(self.machine, self.workdir)


def _quickstart(machine: Machine, workdir: Path) -> subprocess.CompletedProcess[str]:
    return machine.run("quickstart.sh", f"--workdir={workdir}", *SHORT, PYTHONPATH=str(machine.folder))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine")


@pytest.fixture(scope="session")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> ShortRun:
    folder = tmp_path_factory.mktemp("quickstart")
    machine = Machine(folder / "machine")
    machine.add("python3", READY_PYTHON)
    (machine.folder / "sitecustomize.py").write_text(NO_NETWORK, encoding="utf-8")
    return ShortRun(machine, folder / "run", _quickstart(machine, folder / "run"))
