"""What the quickstart chooses, says and calls, on stand-in machines."""

import pytest

from dit_jax.data.shapes_world import COLOURS, HELD_OUT, OUTLINES, RELATIONS
from tests.launch.stand_ins import REPOSITORY, STAND_IN_PYTHON, Machine

NO_DRIVER = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."


def add_gpu(machine: Machine, driver: str, capability: str = "8.9") -> None:
    machine.add(
        "nvidia-smi",
        f'case "$*" in *driver_version*) echo "{driver}" ;; *compute_cap*) echo "{capability}" ;; esac',
    )


@pytest.mark.parametrize(
    ("driver", "capability", "choice"),
    [
        ("580.65.06", "8.9", "cuda13"),
        ("612.10", "12.0", "cuda13"),
        ("580.65.06", "7.0", "cuda12"),  # a V100, which CUDA 13 left behind
        ("579.99", "8.9", "cuda12"),
        ("525.60.13", "8.9", "cuda12"),
        ("524.99", "8.9", "cpu"),
        ("470.256.02", "7.5", "cpu"),
        (NO_DRIVER, "", "cpu"),
        ("", "", "cpu"),
    ],
)
def test_extra_follows_the_driver(machine, driver, capability, choice):
    add_gpu(machine, driver, capability)
    done = machine.run("quickstart.sh", "--print_extra")
    assert (done.stdout, done.stderr, done.returncode) == (f"{choice}\n", "", 0)


def test_extra_of_a_machine_without_nvidia_smi_is_cpu(machine):
    assert machine.run("quickstart.sh", "--print_extra").stdout == "cpu\n"


def test_extra_when_nvidia_smi_exits_with_an_error_is_cpu(machine):
    machine.add("nvidia-smi", f'echo "{NO_DRIVER}"; exit 9')
    assert machine.run("quickstart.sh", "--print_extra").stdout == "cpu\n"


@pytest.mark.parametrize(("value", "choice"), [("", "cpu"), ("cuda12,wandb", "cuda12,wandb"), ("tpu", "tpu")])
def test_a_named_extra_overrides_the_driver(machine, value, choice):
    add_gpu(machine, "580.65.06")
    done = machine.run("quickstart.sh", "--print_extra", DIT_JAX_EXTRAS=value)
    assert done.stdout == f"{choice}\n"


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo 3.10", "is Python 3.10: install Python 3.11 to 3.14"),
        ("echo 3.15", "is Python 3.15: install Python 3.11 to 3.14"),
        ('case "$*" in *version_info*) echo 3.12 ;; *) exit 1 ;; esac', "sudo apt install python3.12-venv"),
        ("exit 127", "does not run: install Python 3.11 to 3.14"),
    ],
    ids=["too old", "too new", "no venv module", "broken"],
)
@pytest.mark.parametrize("named", [True, False], ids=["named", "on PATH"])
def test_a_python_that_will_not_do_ends_in_one_line(machine, script, says, named):
    python = machine.add("python3", script)
    done = machine.run("quickstart.sh", **({"PYTHON": str(python)} if named else {}))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and says in done.stderr
    assert not (machine.folder / "environment").exists()


def test_a_newer_python_beside_an_old_one_is_found(machine):
    machine.add("python3", "echo 3.9")
    machine.add("python3.12", STAND_IN_PYTHON)
    assert machine.run("quickstart.sh").returncode == 0


def test_it_installs_trains_draws_and_scores(machine):
    machine.add("python3", STAND_IN_PYTHON)
    add_gpu(machine, "550.1")
    done = machine.run("quickstart.sh", "--workdir=some where", "--config.total_steps=4", "--", "-v")
    assert done.returncode == 0, done.stderr
    assert "cuda12" in done.stdout.splitlines()[0] and "550.1" in done.stdout.splitlines()[0]
    assert "some where/pictures/grid.png" in done.stdout
    assert done.stdout.endswith("\nshapes: one_object=0.50 two_objects=0.25 new_combinations=0.10\n")
    assert machine.calls() == [
        f"-m venv {machine.folder}/environment",
        "-m pip install --quiet --disable-pip-version-check --no-compile --editable .[cuda12]",
        "-m dit_jax.main --config=configs/quickstart.py --workdir=some where --config.total_steps=4 -v",
        "-m dit_jax.sample --model=some where --prompts_file=launch/quickstart_prompts.txt --num_images=2"
        " --output=some where/pictures",
        "-m dit_jax.evaluate --model=some where --metric=shapes",
    ]


def test_the_folder_may_be_a_word_of_its_own(machine):
    machine.add("python3", STAND_IN_PYTHON)
    assert machine.run("quickstart.sh", "--workdir", "some where").returncode == 0
    assert all("=some where" in call for call in machine.calls() if "dit_jax" in call)
    done = machine.run("quickstart.sh", "--workdir")
    assert (done.returncode, done.stderr) == (2, "--workdir needs a folder\n")


def test_help_tells_and_does_nothing(machine):
    done = machine.run("quickstart.sh", "--help")
    assert done.returncode == 0 and "--print_extra" in done.stdout and "DIT_JAX_EXTRAS" in done.stdout
    assert not (machine.folder / "environment").exists()


def test_on_the_cpu_every_program_is_told_that_this_is_wanted(machine):
    machine.add("python3", STAND_IN_PYTHON)
    assert machine.run("quickstart.sh").returncode == 0
    _, install, *programs = machine.calls()
    assert install.endswith(" --editable .")
    assert len(programs) == 3 and all(" --allow_cpu " in call for call in programs)


def test_run_again_it_does_not_install_again(machine):
    machine.add("python3", STAND_IN_PYTHON)
    machine.run("quickstart.sh")
    machine.calls()
    machine.run("quickstart.sh")
    assert not any(call.startswith(("-m pip", "-m venv")) for call in machine.calls())


def test_an_interrupted_install_is_done_again(machine):
    machine.add("python3", STAND_IN_PYTHON.replace("esac", '  "-m pip "*) exit 1 ;;\nesac'))
    assert machine.run("quickstart.sh").returncode == 1
    assert machine.calls()[-1].startswith("-m pip")
    machine.run("quickstart.sh")
    assert [call[:6] for call in machine.calls()] == ["-m pip"]


def test_another_extra_makes_the_environment_anew(machine):
    machine.add("python3", STAND_IN_PYTHON)
    machine.run("quickstart.sh", DIT_JAX_EXTRAS="cuda12")
    machine.calls()
    done = machine.run("quickstart.sh", DIT_JAX_EXTRAS="cuda13")
    assert "making it anew" in done.stdout
    assert [call[:6] for call in machine.calls()[:2]] == ["-m ven", "-m pip"]


def test_uv_is_used_where_it_is(machine):
    machine.add("python3", 'case "$*" in *version_info*) echo 3.12 ;; *) exit 1 ;; esac')  # no venv module
    stand_in = machine.add("stand_in", STAND_IN_PYTHON)
    make = f'mkdir -p "$5/bin" && cp {stand_in} "$5/bin/python"'
    machine.add("uv", f'echo "uv $*" >>"$RECORD"; if [ "$1" = venv ]; then {make}; fi')
    done = machine.run("quickstart.sh", DIT_JAX_EXTRAS="wandb")
    assert done.returncode == 0, done.stderr
    environment = machine.folder / "environment"
    assert [line for line in machine.record.read_text().splitlines() if line.startswith("uv ")] == [
        f"uv venv --quiet --python {machine.path}/python3 {environment}",
        f"uv pip install --quiet --python {environment}/bin/python --editable .[wandb]",
    ]


def test_a_program_that_fails_stops_the_script_with_its_exit_code(machine):
    failing = STAND_IN_PYTHON.replace("esac", '  "-m dit_jax.main "*) echo "config error: no" >&2; exit 2 ;;\nesac')
    machine.add("python3", failing)
    done = machine.run("quickstart.sh")
    assert (done.returncode, done.stderr) == (2, "config error: no\n")
    assert machine.calls()[-1].startswith("-m dit_jax.main")


def test_the_prompts_speak_of_the_shapes_world_and_the_last_three_were_held_out():
    prompts = (REPOSITORY / "launch" / "quickstart_prompts.txt").read_text(encoding="utf-8").splitlines()
    looks = []
    for prompt in prompts:
        separators = [relation for relation in RELATIONS if f" {relation} " in prompt]
        phrases = prompt.split(f" {separators[0]} ") if separators else [prompt]
        for phrase in phrases:
            article, size, colour, shape = phrase.split()
            assert article == "a" and size in ("small", "large") and colour in COLOURS and shape in OUTLINES
        looks.append({tuple(phrase.split()[2:]) for phrase in phrases})
    assert all(look <= HELD_OUT for look in looks[-3:])
    assert not any(look & HELD_OUT for look in looks[:-3])
