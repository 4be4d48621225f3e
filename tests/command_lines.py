"""Command lines of this package as documents and launch files have them, and whether the programs would take them."""

import importlib
import re
import shlex
from collections.abc import Iterator

import pytest

from tests.test_layers import PACKAGE

CALL = re.compile(r"python\"? -m dit_jax\.(?P<program>\w+)(?P<arguments>[^\n#`]*)")
EXPANSION = re.compile(r"\$\([^()]*\)|\$\{[^}]*\}|\$\w+|\$@")
CONFIG = "--config=configs/quickstart.py"


def commands_in(text: str) -> Iterator[tuple[str, list[str]]]:
    """Program and arguments of every ``python -m dit_jax.PROGRAM ...``; what a shell would expand is a 1."""
    for call in CALL.finditer(text.replace("\\\n", " ")):
        expanded = EXPANSION.sub("1", re.sub(r"\"\$@\"|\$arguments|\$\(printf [^)]*\)", "", call["arguments"]))
        words = shlex.shlex(expanded.replace("\\", ""), posix=True, punctuation_chars=True)
        words.whitespace_split = True
        arguments = []
        for word in words:
            if set(word) <= set("();<>|&"):
                break
            arguments.append(word)
        yield call["program"], arguments


def parse(program: str, arguments: list[str]) -> None:
    """Have the program's own parser read the arguments, and nothing done with them; a mistake is an AssertionError."""
    name = f"dit_jax.{program}.__main__" if (PACKAGE / program).is_dir() else f"dit_jax.{program}"
    module = importlib.import_module(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "run_program", lambda *_: None)
        try:
            module.main(arguments)
        except SystemExit as exit:  # of --help too
            assert not exit.code, (program, arguments)
