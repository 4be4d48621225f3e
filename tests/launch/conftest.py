"""The machine that a test of a launch script runs on."""

from pathlib import Path

import pytest

from tests.launch.stand_ins import Machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine")
