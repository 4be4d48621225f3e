"""The script for Cloud TPU slices, under a stand-in for gcloud whose two machines are folders."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.stand_ins import REPOSITORY, Machine

# Records what it is asked for. A slice is there at the second look; scp and ssh reach two machines, each a folder that
# is its home, where commands run for real.
GCLOUD = """
echo "gcloud $*" >>"$RECORD"
case "$3 $4" in
  "queued-resources describe")
    if [ -n "${STATE:-}" ]; then echo "$STATE"; elif [ -f "$HOME/asked" ]; then echo ACTIVE; else echo PROVISIONING; fi
    : >"$HOME/asked" ;;
  "tpu-vm scp") for i in 0 1; do mkdir -p "$HOME/vm$i"; cp "$5" "$HOME/vm$i/"; done ;;
  "tpu-vm ssh")
    for argument; do case $argument in --command=*) command=${argument#--command=} ;; esac; done
    for i in 0 1; do (export HOME="$HOME/vm$i"; cd "$HOME" && bash -c "$command") || exit; done ;;
esac
"""

# Of an environment: says that it is there and with what, and waits to be told to end.
PYTHON = """
echo "$(basename "$HOME") $*" >>"$RECORD"
trap 'echo "$(basename "$HOME") saved" >>"$RECORD"; exit 75' TERM
echo "trains"
i=0
while [ $i -lt 300 ]; do sleep 0.1; i=$((i + 1)); done
"""

UV = f"""
case "$1 $2" in
  "python find") echo "{sys.executable}" ;;
  "venv --quiet") mkdir -p "$5/bin" && cp "$0.environment" "$5/bin/python" ;;
  "pip install") echo "$(basename "$HOME") ${{@:4}}" >>"$RECORD" ;;
esac
"""


@pytest.fixture
def desk(tmp_path) -> Machine:
    """Where the script is called from; the stand-ins serve the machines of the slice too."""
    machine = Machine(tmp_path)
    machine.add("gcloud", GCLOUD)
    machine.add("uv", UV)
    machine.add("uv.environment", PYTHON)
    machine.add("python3", "")
    return machine


def call(desk: Machine, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return desk.run("tpu_vm.sh", *arguments, DIT_JAX_POLL="0", **environment)


def record(desk: Machine) -> list[str]:
    return desk.record.read_text().splitlines() if desk.record.exists() else []


def test_a_slice_is_asked_for_waited_for_and_given_back(desk):
    done = call(desk, "create", "pod", "--zone=z", "--accelerator-type=v5litepod-16", "--spot")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["pod: PROVISIONING", "pod: ACTIVE"]
    done = call(desk, "delete", "pod", "--zone=z")
    assert done.returncode == 0, done.stderr
    look = "gcloud compute tpus queued-resources describe pod --zone=z --format=value(state.state)"
    asked = (
        "gcloud compute tpus queued-resources create pod --node-id=pod --zone=z --accelerator-type=v5litepod-16 --spot"
    )
    freed = "gcloud compute tpus queued-resources delete pod --zone=z --force --quiet"
    assert record(desk) == [asked, look, look, freed]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_a_slice_that_will_never_come_is_not_waited_for(desk, state):
    done = call(desk, "create", "pod", STATE=state)
    assert done.returncode == 2 and f"pod is {state}: delete it, and ask again" in done.stderr


def test_every_machine_gets_the_tree_trains_tells_and_saves_when_it_is_told(desk):
    done = call(desk, "install", "pod")
    assert done.returncode == 0, done.stderr
    lines = record(desk)
    assert lines[0].startswith("gcloud compute tpus tpu-vm scp ")
    assert lines[0].endswith("/dit_jax.tar.gz pod: --worker=all")
    assert not Path(lines[0].split()[5]).exists()  # of this machine, where nothing stays
    assert lines[1].startswith("gcloud compute tpus tpu-vm ssh pod --worker=all --command=")
    assert [line for line in lines if "--editable" in line] == [
        f"vm{i} --python .venv/bin/python --editable .[tpu,gcs,hf]" for i in (0, 1)
    ]
    for i in (0, 1):
        tree = desk.folder / f"vm{i}" / "dit_jax"
        assert (tree / "dit_jax" / "main.py").read_bytes() == (REPOSITORY / "dit_jax" / "main.py").read_bytes()
        assert (tree / "configs" / "xl.py").is_file()

    desk.record.unlink()
    flags = "--config=configs/xl.py", "--workdir=gs://bucket/a b"
    done = call(desk, "train", "pod", *flags)
    assert done.returncode == 0, done.stderr
    ran = [f"vm{i} -m dit_jax.main --coordinator=auto {' '.join(flags)}" for i in (0, 1)]
    wait_for(lambda: sorted(line for line in record(desk) if line.startswith("vm")) == ran)
    again = call(desk, "train", "pod", *flags)
    assert again.returncode == 2 and "it trains already" in again.stderr

    done = call(desk, "logs", "pod")
    assert done.stdout == "trains\n" * 2 and (desk.folder / "logs" / "pod").is_dir()
    assert record(desk)[-1].endswith("--output-directory=logs/pod")
    call(desk, "stop", "pod")
    wait_for(lambda: {"vm0 saved", "vm1 saved"} <= set(record(desk)))


def wait_for(law, seconds: float = 30) -> None:
    begin = time.monotonic()
    while not law():
        assert time.monotonic() - begin < seconds
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "'' is not create, install, train, logs, stop or delete"),
        (("start", "pod"), "'start' is not create"),
        (("create",), "create needs the NAME of a slice"),
        (("train", "--config=configs/xl.py"), "train needs the NAME of a slice"),
        (("delete", "pod", "--spot"), "delete takes no --spot"),
        (("train", "pod", "--config=configs/xl.py"), "train needs --workdir=gs://BUCKET/FOLDER"),
        (("train", "pod", "--config=configs/xl.py", "--workdir=runs/xl"), "train needs --workdir=gs://BUCKET/FOLDER"),
    ],
)
def test_a_mistake_is_told_before_anything_is_asked_for(desk, arguments, says):
    done = call(desk, *arguments)
    assert done.returncode == 2 and done.stderr.startswith(f"tpu_vm.sh: {says}") and not record(desk)


def test_without_gcloud_it_says_what_to_install(tmp_path):
    done = Machine(tmp_path).run("tpu_vm.sh", "create", "pod")
    assert done.returncode == 2
    assert done.stderr == "tpu_vm.sh: there is no gcloud: install the Google Cloud CLI, then run gcloud auth login\n"
