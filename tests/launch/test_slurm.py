"""The Slurm script under a stand-in for srun: it passes signals on, and asks to be started again for 75 alone."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.launch.stand_ins import REPOSITORY, Machine

# As srun does it: a process for every task, signals are passed on, the largest exit code is the step's.
SRUN = """
tasks=()
for i in 0 1; do
  SLURM_JOB_ID=7 SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_PROCID=$i SLURM_LOCALID=0 "$@" &
  tasks+=($!)
done
trap 'told=1; for task in "${tasks[@]}"; do kill -USR1 "$task" 2>/dev/null; done' USR1
largest=0
for task in "${tasks[@]}"; do
  while told=; wait "$task"; code=$?; [ -n "$told" ]; do :; done
  if [ "$code" -gt "$largest" ]; then largest=$code; fi
done
exit "$largest"
"""


@pytest.fixture
def cluster(tmp_path) -> Machine:
    """A login node; its environment's python is for the test to give."""
    machine = Machine(tmp_path)
    machine.add("srun", SRUN)
    machine.add("scontrol", 'echo "scontrol $*" >>"$RECORD"')
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    return machine


def submit(cluster: Machine, python: str, *arguments: str) -> subprocess.Popen[str]:
    """Start the script as sbatch does, with a python of these lines."""
    program = cluster.add("python", python)
    program.rename(cluster.folder / ".venv" / "bin" / "python")
    keep = {key: value for key, value in os.environ.items() if key.startswith(("JAX_", "HF_", "XDG_"))}
    return subprocess.Popen(
        ["bash", str(REPOSITORY / "launch" / "slurm.sh"), *arguments],
        env=keep
        | {
            "PATH": str(cluster.path),
            "HOME": str(cluster.folder),
            "RECORD": str(cluster.record),
            "SLURM_SUBMIT_DIR": str(cluster.folder),
            "SLURM_JOB_ID": "7",
            "PYTHONPATH": str(REPOSITORY),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def record(cluster: Machine, process: int | None = None) -> list[str]:
    """What the script had done, or what a process of the job did; one file each, for no two to write at once."""
    path = cluster.record if process is None else cluster.record.with_suffix(f".{process}")
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("code", [0, 1, 3, 9, 75])
def test_a_job_is_queued_again_where_the_run_is_to_be_started_again_and_nowhere_else(cluster, code):
    job = submit(
        cluster, f'echo "$*" >"${{RECORD%.txt}}.$SLURM_PROCID"; exit {code}', "--config=configs/xl.py", "--workdir=w"
    )
    job.communicate(timeout=30)
    assert job.returncode == code
    ran = ["-m dit_jax.main --coordinator=auto --config=configs/xl.py --workdir=w"]
    assert record(cluster, 0) == record(cluster, 1) == ran
    assert record(cluster) == (["scontrol requeue 7"] if code == 75 else [])


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_every_process_is_told_when_the_time_is_up_and_may_save(cluster, number):
    python = """
trap 'echo saved >"${RECORD%.txt}.$SLURM_PROCID"; exit 75' USR1
echo "$SLURM_PROCID trains"
while :; do sleep 0.05; done
"""
    job = submit(cluster, python)
    assert {job.stdout.readline(), job.stdout.readline()} == {"0 trains\n", "1 trains\n"}
    job.send_signal(number)
    job.communicate(timeout=30)
    assert job.returncode == 75
    assert record(cluster, 0) == record(cluster, 1) == ["saved"]
    assert record(cluster) == ["scontrol requeue 7"]


def test_without_slurm_it_says_how_it_is_started(tmp_path):
    done = Machine(tmp_path).run("slurm.sh")
    assert done.returncode == 1 and "start it with sbatch, from the folder of dit_jax" in done.stderr


@pytest.mark.slow
def test_a_real_run_of_two_processes_is_told_saves_and_goes_on(cluster, tmp_path):
    import sys

    from tests.tiny_run import tiny_flags

    flags = tiny_flags(tmp_path / "run", total_steps="400", save_every="400", sample_every="0", log_every="10")
    python = f'export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=1; exec {sys.executable} "$@"'
    job = submit(cluster, python, *flags)
    for line in job.stdout:
        if line.startswith("step=20/"):
            job.send_signal(signal.SIGUSR1)
    _, err = job.communicate(timeout=120)
    assert job.returncode == 75, err
    assert record(cluster) == ["scontrol requeue 7"]
    saved = max(int(path.name) for path in Path(tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    assert 20 <= saved < 400
    again = submit(cluster, python, *flags, f"--config.stop_at_step={saved + 2}")
    out, err = again.communicate(timeout=240)
    assert again.returncode == 0 and f"resuming from step {saved}" in out, err
