"""Whatever happens to the newest checkpoint of a run: it is named and set aside, and the run ends as if it had not."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dit_jax import train
from tests.test_train import assert_same_run
from tests.tiny_run import tiny_config
from tests.training.test_checkpoint import needed_files

SEED = 0


def flip_a_bit(path: Path, choose: random.Random) -> None:
    content = bytearray(path.read_bytes())
    bit = choose.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def cut(path: Path, choose: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: choose.randrange(len(content))])


def lose(path: Path, choose: random.Random) -> None:
    path.unlink()


def empty(path: Path, choose: random.Random) -> None:
    shutil.rmtree(path)
    path.mkdir()


def lose_all(path: Path, choose: random.Random) -> None:
    shutil.rmtree(path)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("hurt", "count", "where"),
    [(flip_a_bit, 40, None), (cut, 10, None), (lose, 10, None), (empty, 1, "."), (lose_all, 1, "metadata")],
)
def test_a_damaged_checkpoint_is_named_and_survived(
    hurt: Callable[[Path, random.Random], None], count: int, where: str | None, tiny_run, tmp_path, capsys
):
    """``where`` is in the folder of the step; None is any file of it that is read."""
    choose = random.Random(SEED)
    for i in range(count):
        run = shutil.copytree(tiny_run, tmp_path / str(i))
        step = run / "checkpoints" / "20"
        path = step / where if where else choose.choice(needed_files(step))
        name = {None: path.relative_to(step).as_posix(), ".": "manifest.sha256", "metadata": "metadata/"}[where]
        hurt(path, choose)
        train.run(tiny_config(sample_every="0"), run)
        said = capsys.readouterr().out
        assert f"warning: checkpoint: step 20 is damaged: {name}" in said, (name, said)
        assert f"set aside as {step}.corrupt" in said and "resuming from step 15" in said, said
        assert_same_run(tiny_run, run, 20)
        shutil.rmtree(run)
    with capsys.disabled():
        print(f"\n{hurt.__name__}: {count} of {count} named, set aside and survived")
