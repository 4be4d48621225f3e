"""Several processes that are one run: real ones, over loopback, with the tiny config and one fake device each."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from dit_jax import processes
from dit_jax.errors import LostError, PreemptedError
from tests import xla
from tests.tiny_run import tiny_flags, train_tiny

ROOT = Path(__file__).parents[1]
LONG = 600  # seconds; on a machine that is busy, a start takes a minute
MINUTE = 60  # seconds; what a process is given to notice that another is gone


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Ended(NamedTuple):
    """How a process ended, and what it said."""

    code: int
    out: str
    err: str


class Run:
    """Processes that are one run; ``own`` are flags that only one of them has."""

    def __init__(self, folder: Path, workdir: Path, count: int = 2, own: Sequence[Sequence[str]] = (), **changes: str):
        folder.mkdir()
        environment = {**os.environ, "XLA_FLAGS": xla.flags(devices=1)}
        several = f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}"
        self._folder, self.processes = folder, []
        for i in range(count):
            mine = (*several, f"--process_id={i}", *(own[i] if own else ()))
            command = [sys.executable, "-m", "dit_jax.main", *tiny_flags(workdir, **changes), *mine]
            with (folder / f"out.{i}").open("w") as out, (folder / f"err.{i}").open("w") as err:
                self.processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err))

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def wait_for(self, path: Path) -> None:
        """Return when there is such a file."""
        begin = time.monotonic()
        while not path.exists():
            assert time.monotonic() - begin < LONG and self.processes[0].poll() is None, self.end(0, 1)
            time.sleep(0.02)

    def end(self, i: int, seconds: float = LONG) -> Ended:
        code = self.processes[i].wait(seconds)
        return Ended(code, *((self._folder / f"{name}.{i}").read_text() for name in ("out", "err")))


def rows(workdir: Path) -> dict[int, dict[str, float]]:
    """All figures of a step, by the step; none is written twice."""
    found: dict[int, dict[str, float]] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        step = found.setdefault(row.pop("step"), {})
        assert not step.keys() & row.keys()
        step.update(row)
    return found


def assert_same_losses(found: Path, expected: Path, last: int) -> None:
    ours, theirs = rows(found), rows(expected)
    assert [step for step in ours if step <= last] == [step for step in theirs if step <= last]
    for step in range(1, last + 1):
        if step in theirs:
            for name in theirs[step]:
                assert ours[step][name] == pytest.approx(theirs[step][name], rel=1e-5, abs=1e-6), (step, name)


def newest(workdir: Path) -> int:
    return max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


# --- alone --------------------------------------------------------------------------------------------------


def test_alone_a_process_is_the_first_and_agrees_with_itself(tmp_path):
    assert processes.is_first() and (processes.index(), processes.count()) == (0, 1)
    assert processes.agreement() is None and processes.of_first({"a": (1, None)}) == {"a": (1, None)}
    assert processes.own_file(tmp_path / "a.jsonl") == tmp_path / "a.jsonl" and processes.own_rows(6) == range(6)
    tree = {"a": np.zeros(2)}
    assert processes.own_copy(tree) is tree
    processes.barrier()
    processes.finish()
    processes.leave("a word to nobody", 3)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_all_rows_belong_to_one_process_each(count):
    shares = [processes.rows_of(12, index, count) for index in range(count)]
    assert [row for share in shares for row in share] == list(range(12)) and len({len(s) for s in shares}) == 1


# --- together -----------------------------------------------------------------------------------------------


def test_a_run_goes_from_one_process_to_two_and_back(tiny_run, tmp_path):
    """The same losses, and every file written once. A step of the two is also what one process restores."""
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run, workdir)
    for step in (15, 20):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    with Run(tmp_path / "two", workdir, stop_at_step="15", validate_every="0") as two:
        for i in (0, 1):
            ended = two.end(i)
            assert ended.code == 0, ended.err
            assert f"process {i} of 2: " in ended.out and ("done: step 15" in ended.out) == (i == 0)
    assert "resuming from step 10" in two.end(0).out and "devices: 2 x cpu" in two.end(0).out
    (begun,) = re.findall("^first step after .*$", two.end(0).out, re.MULTILINE)
    assert "first step after" not in two.end(1).out
    whole, *parts = re.findall(r"(\d+\.\d)(?:,|$| s)", begun)
    names = "imports", "data and encoders", "restore", "encoding", "first batch", "compile", "step"
    assert all(f" {name} " in begun for name in names) and len(parts) == len(names)
    assert sum(map(float, parts)) == pytest.approx(float(whole), abs=0.41)  # tenths of eight figures
    assert newest(workdir) == 15 and len(list((workdir / "tb").iterdir())) == len(list((tiny_run / "tb").iterdir())) + 1
    assert_same_losses(workdir, tiny_run, 15)
    train_tiny(workdir)
    assert_same_losses(workdir, tiny_run, 20)


def test_a_signal_to_one_stops_both_and_the_death_of_one_ends_the_other(tmp_path):
    """With gradient accumulation, validation and samples; what they leave, one process goes on with."""
    changes = {
        "accumulate": "2",
        "model__dropout": "0",
        "total_steps": "4000",
        "log_every": "1",
        "save_every": "10",
        "sample_every": "20",
        "validate_every": "20",
        "data__validation_fraction": "0.2",
        "data__num_pictures": "40",
    }
    workdir = tmp_path / "run"
    with Run(tmp_path / "told", workdir, **changes) as run:
        run.wait_for(workdir / "checkpoints" / "20")
        run.processes[1].send_signal(signal.SIGTERM)
        told = [run.end(i) for i in (0, 1)]
    assert [ended.code for ended in told] == [PreemptedError.exit_code] * 2, told
    lines = [ended.err.strip() for ended in told]
    assert lines[0] == lines[1] == f"preempted: SIGTERM: step {newest(workdir)} is saved; " + lines[0].split("; ")[1]
    assert (workdir / "samples" / "00000020.png").exists() and "validation_x0_error" in rows(workdir)[20]

    stopped = newest(workdir)
    with Run(tmp_path / "killed", workdir, **changes) as run:
        run.wait_for(workdir / "checkpoints" / str(stopped // 10 * 10 + 10))
        run.processes[1].kill()
        survivor = run.end(0, MINUTE)
    assert f"resuming from step {stopped}" in survivor.out
    assert survivor.code == LostError.exit_code and survivor.err.count("\n") == 1, survivor.err
    assert "another process was lost" in survivor.err

    stop = str(newest(workdir) + 5)
    train_tiny(workdir, **changes, stop_at_step=stop)
    whole = train_tiny(tmp_path / "whole", **changes, stop_at_step="20")
    assert list(rows(workdir)) == list(range(1, int(stop) + 1))
    assert_same_losses(workdir, whole, 20)


def test_an_error_of_one_ends_the_other(tmp_path):
    with Run(tmp_path / "said", tmp_path / "run", own=[(), ("--config.batch_size=7",)]) as run:
        first, second = run.end(0), run.end(1)
    assert second.code == 2 and second.err.startswith("config error: batch_size 7 is not divisible"), second.err
    assert first.code == LostError.exit_code, first.err
    said = re.escape(second.err.strip())
    assert re.search(rf"another process was lost: process 1 ended with exit code 2 \({said}\)", first.err)


@pytest.mark.parametrize(
    ("process", "says"), [(0, "not all of the 2 processes came to"), (1, "process 0 does not answer at")]
)
def test_who_waits_for_others_in_vain_says_whom_it_misses(process, says):
    place = f"127.0.0.1:{free_port()}"
    program = f"from dit_jax import processes as p; p.start(p.Place({place!r}, 2, {process}), patience=1.0)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=LONG)
    assert done.returncode == LostError.exit_code
    assert done.stderr.splitlines()[-1].startswith(f"lost: process {process} waited 1 seconds: {says} ")
    assert place in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("moment", ["training", "waiting"])
def test_whoever_is_lost_whenever_the_other_ends_within_a_minute(tmp_path, killed, moment):
    """In an all-reduce, or where nothing tells that a socket was closed."""
    code = "p.barrier()" if moment == "waiting" else "[m.process_allgather(1) for _ in range(10**9)]"
    place = f"127.0.0.1:{free_port()}"
    program = f"""
import os, sys, time
from dit_jax import ending, processes as p
from jax.experimental import multihost_utils as m
def main():
    p.start(p.Place({place!r}, 2, int(sys.argv[1])))
    m.process_allgather(1)
    if sys.argv[1] == "{killed}":
        time.sleep(2)
        os.kill(os.getpid(), 9)
    {code}
ending.run_program(main, False, "")
"""
    environment = {**os.environ, "XLA_FLAGS": xla.flags(devices=1), "TF_CPP_MIN_LOG_LEVEL": "3"}
    options = {"cwd": ROOT, "env": environment, "stderr": subprocess.PIPE, "text": True}
    with (
        subprocess.Popen([sys.executable, "-c", program, str(killed)], **options) as lost,
        subprocess.Popen([sys.executable, "-c", program, str(1 - killed)], **options) as survivor,
    ):
        assert lost.wait(LONG) == -signal.SIGKILL
        begin = time.monotonic()
        assert survivor.wait(MINUTE) == LostError.exit_code
        assert "lost: another process was lost" in survivor.stderr.read().splitlines()[-1]
        print(f"process {killed} lost while {moment}: noticed after {time.monotonic() - begin:.0f} s")


# --- other numbers of devices -------------------------------------------------------------------------------


def test_a_checkpoint_goes_from_eight_devices_to_one_and_to_four(tmp_path):
    """Every restored number is the one that was saved, and every loss that of one device, with accumulation too."""
    program = f"""
import jax, numpy as np
from pathlib import Path
from dit_jax.sharding import make_mesh, put_batch, replicated, with_sharding
from dit_jax.training.checkpoint import Checkpoints
from tests.toy import Toy
from tests.toy_step import make_batch, make_state, make_step
toy = Toy(dropout=0.0)
checkpoints = Checkpoints(Path({str(tmp_path)!r}), 9, 0)
batch = {{key: np.tile(a, (4, *[1] * (a.ndim - 1))) for key, a in make_batch(toy).items()}}
step = make_step(toy, accumulate=2)
take, one = jax.jit(step), make_mesh(jax.devices()[:1])
state = jax.device_put(make_state(toy, step), replicated(make_mesh(jax.devices())))
for count in (8, 1, 4):
    mesh = make_mesh(jax.devices()[:count])
    if count != 8:
        saved, state = state, checkpoints.restore(int(state.step), with_sharding(state, replicated(mesh)))
        for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(saved), strict=True):
            assert len(ours.sharding.device_set) == count
            np.testing.assert_array_equal(ours, theirs)
    _, expected = take(jax.device_put(state, replicated(one)), put_batch(batch, one))
    state, metrics = take(state, put_batch(batch, mesh))
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    checkpoints.save(state, {{}})
    checkpoints.wait()
assert int(state.step) == 103
"""
    environment = {**os.environ, "XLA_FLAGS": xla.flags(devices=8)}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True, timeout=LONG)


@pytest.mark.slow
def test_a_run_goes_from_eight_devices_to_one_and_to_four(tiny_run, tmp_path):
    """Every restored number is the one that was saved, and the losses are those of two devices."""
    program = f"""
import jax, numpy as np
from pathlib import Path
from dit_jax import build, train
from dit_jax.sharding import make_mesh, replicated, with_sharding
from dit_jax.training.checkpoint import Checkpoints
from tests.tiny_run import tiny_config
workdir = Path({str(tmp_path / "run")!r})
for count, stop in ((8, 5), (1, 10), (4, 20)):
    build.make_mesh = lambda config, devices: make_mesh(devices[:count])
    state = train.run(tiny_config(sample_every="0", stop_at_step=str(stop)), workdir)
    assert len(state.step.sharding.device_set) == count
    for other in (8, 1, 4):
        shapes = with_sharding(state, replicated(make_mesh(jax.devices()[:other])))
        found = Checkpoints(workdir / "checkpoints", 9, 0).restore(stop, shapes)
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
            assert len(ours.sharding.device_set) == other
            np.testing.assert_array_equal(ours, theirs)
"""
    environment = {**os.environ, "XLA_FLAGS": xla.flags(devices=8)}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True, timeout=LONG)
    ours, theirs = rows(tmp_path / "run"), rows(tiny_run)
    assert ours.keys() == theirs.keys()
    assert_same_losses(tmp_path / "run", tiny_run, 20)
