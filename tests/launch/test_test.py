"""What the test script installs and runs, on stand-in machines."""

from tests.launch.stand_ins import STAND_IN_PYTHON


def test_it_installs_the_test_extra_and_hands_its_arguments_to_pytest(machine):
    machine.add("python3", STAND_IN_PYTHON)
    done = machine.run("test.sh", "tests/some room", "-k", "a or b", JAX_PLATFORMS="")
    assert done.returncode == 0, done.stderr
    assert machine.calls() == [
        f"-m venv {machine.folder}/environment",
        "-m pip install --quiet --disable-pip-version-check --no-compile --editable .[test]",
        "-m pytest tests/some room -k a or b",
    ]


def test_the_whole_suite_runs_in_two_processes(machine):
    machine.add("python3", STAND_IN_PYTHON)
    machine.run("test.sh")
    assert machine.calls()[-1] == "-m pytest -n 2 --dist loadfile --no-loadscope-reorder"


def test_the_soak_is_two_rooms_and_whatever_its_arguments_name(machine):
    record = STAND_IN_PYTHON.replace("esac", '  "-m pytest"*) echo "$DIT_JAX_SOAK" ;;\nesac')
    machine.add("python3", record)
    assert machine.run("test.sh", "--soak").stdout.endswith("\n1\n")
    assert machine.calls()[-1] == "-m pytest -m not slow tests/soak tests/hostile"
    machine.run("test.sh", "--soak", "-k", "kills")
    assert machine.calls()[-1] == "-m pytest -m not slow -k kills"


def test_more_extras_can_be_named(machine):
    machine.add("python3", STAND_IN_PYTHON)
    machine.run("test.sh", "--install_only", DIT_JAX_TEST_EXTRAS="torch,dev")
    assert machine.calls()[-1].endswith(" --editable .[test,torch,dev]")


def test_the_tests_run_on_the_cpu(machine):
    machine.add("python3", STAND_IN_PYTHON.replace("esac", '  "-m pytest"*) echo "$JAX_PLATFORMS" ;;\nesac'))
    assert machine.run("test.sh", JAX_PLATFORMS="cuda").stdout.endswith("\ncpu\n")
    assert machine.run("test.sh", JAX_PLATFORMS="cuda").stdout == "cpu\n"


def test_what_a_first_start_compiles_is_kept_for_the_next(machine):
    script = '  "-m pytest"*) echo "kept: ${PYTHONDONTWRITEBYTECODE:-yes}" ;;\nesac'
    machine.add("python3", STAND_IN_PYTHON.replace("esac", script))
    assert machine.run("test.sh", PYTHONDONTWRITEBYTECODE="1").stdout.endswith("kept: yes\n")
