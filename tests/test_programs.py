"""What a terminal shows of the programs: their list, and the examples of their help."""

import subprocess
import sys

import pytest

from dit_jax.__main__ import PROGRAMS, purpose
from tests.command_lines import commands_in, parse
from tests.test_layers import PACKAGE, REPOSITORY


def listed(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dit_jax", *words], cwd=REPOSITORY, capture_output=True, text=True)


def test_all_programs_are_listed_with_what_they_do():
    done = listed()
    assert done.returncode == 0 and not done.stderr and "\033" not in done.stdout
    for program in PROGRAMS:
        assert f"  {program:<12}{purpose(program)}\n" in done.stdout and purpose(program).endswith(".")
    started = {
        path.parent.name if path.stem == "__main__" else path.stem
        for path in [*PACKAGE.glob("*.py"), *PACKAGE.glob("*/__main__.py")]
        if "__name__ ==" in path.read_text(encoding="utf-8")
    }
    assert started - {PACKAGE.name} == set(PROGRAMS)
    assert all(len(line) <= 120 for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("word", "says"), [("sample", "sample is started by python -m dit_jax.sample"), ("trian", "trian is no program")]
)
def test_what_is_no_program_is_told(word, says):
    done = listed(word)
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == says and not done.stdout


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_help_of_a_program_ends_with_commands_that_it_takes(program, capsys):
    parse(program, ["--help"])
    head, _, examples = capsys.readouterr().out.partition("\nexamples:\n")
    assert purpose(program) in " ".join(head.split()) and "\033" not in head
    lines = examples.splitlines()
    assert lines and all(line.startswith("  python ") for line in lines)
    for name, arguments in commands_in(examples):
        parse(name, arguments)
