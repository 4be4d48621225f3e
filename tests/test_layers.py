"""The layers of the house: imports only go down, and what is optional stays optional.

A room is a folder or a file directly under ``dit_jax/``. ``MAY_IMPORT`` says which other rooms each may
import, at the top of a file or inside a function. The rest reads ``setup.cfg`` and the source of the package.
"""

import ast
import configparser
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "dit_jax"

LEAVES = {"arrays", "trees", "sharding", "errors", "files", "stores", "processes", "vigil", "workdir"}  # layer 0
LIBRARIES = {"diffusion", "models", "encoders", "data"}  # layer 1: do not know each other
ROOMS = {"training", "metrics"}  # layer 2
# layer 4
PROGRAMS = {
    *("sample", "evaluate", "train", "dry_run", "precompute", "export", "serve", "doctor", "bench", "report"),
}
# layer 3
MIDDLE = {
    "config", "resolve", "build", "encoded", "feed", "exchange", "stored", "origin", "drawing", "runtime", "ending",
    "duties", "parts", "mirror",
}  # fmt: skip
BELOW_PROGRAMS = LEAVES | LIBRARIES | ROOMS | MIDDLE

MAY_IMPORT = {
    "__init__": set(),
    **{leaf: set() for leaf in LEAVES},
    "sharding": {"trees"},
    "stores": {"errors"},
    "processes": {"errors", "sharding", "vigil"},
    "vigil": {"errors"},
    "workdir": {"errors", "processes", "stores"},  # where a run lies
    **{library: LEAVES for library in LIBRARIES},
    **{room: LEAVES | LIBRARIES for room in ROOMS},
    "config": LEAVES,  # knows of no object that is made from it
    "resolve": LEAVES | {"encoders"},  # completes a config
    "build": LEAVES | LIBRARIES | ROOMS | {"resolve"},
    "encoded": LEAVES | LIBRARIES | ROOMS | {"build"},  # what is encoded once
    "feed": LEAVES | LIBRARIES | ROOMS | {"config", "build", "encoded"},  # what runs are fed with
    "exchange": LEAVES | {"diffusion", "encoders", "config"},  # trained models as other programs have them
    "stored": LEAVES | ROOMS | {"encoders", "config", "build", "exchange"},  # trained models on disk
    "origin": LEAVES | ROOMS | {"encoders", "config", "exchange", "stored"},  # what a new run begins with
    "drawing": LEAVES | LIBRARIES | {"config", "resolve", "build", "stored"},  # prompts in, pictures out
    "runtime": LEAVES,  # how programs start
    "ending": LEAVES,  # and how they end
    "mirror": LEAVES | {"training", "config"},  # and a copy of it
    "parts": LEAVES | LIBRARIES | {"training", "build", "resolve", "runtime"},
    "duties": LEAVES | {"training", "metrics", "drawing", "config"},  # what a run does beside its steps
    **{program: BELOW_PROGRAMS | {"sample"} for program in PROGRAMS},
    "__main__": set(),  # lists the programs, and imports none
    "main": PROGRAMS | {"config", "runtime", "ending", "errors", "processes", "stores"},
}

# Read by one kind of source each, imported inside the functions that need them.
DATA_LIBRARIES = ["pyarrow", "datasets", "huggingface_hub", "tensorflow_datasets", "array_record", "tensorflow"]

# Third-party modules of rooms that promise to need little; a path is matched from its start.
NEEDS_ONLY = {
    "models/": {"jax", "flax", "numpy"},
    "diffusion/": {"jax", "flax", "numpy"},
    "training/step.py": {"jax", "flax", "optax", "numpy"},
    "training/state.py": {"jax", "flax", "optax", "numpy"},
    "training/optimizer.py": {"jax", "flax", "optax", "numpy"},
    # Never touches a device.
    "data/": {"numpy", "ml_dtypes", "PIL", *DATA_LIBRARIES},
}

IMPORT_NAME = {"orbax-checkpoint": "orbax", "pillow": "PIL"}  # where it is not its own
OPTIONAL = ["torch", "diffusers", "tensorflow", "tensorflow_datasets", "datasets", "pyarrow", "fastapi", "wandb"]

# assets/ is data: what programs read or copy, and nothing imports; tests/test_torch_dit.py sees to the source in it
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if not path.is_relative_to(PACKAGE / "assets"))
each_source = pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.relative_to(PACKAGE).as_posix())


def imports(source: Path, later: bool) -> Iterator[str]:
    """Dotted names that a file imports; ``from a import b`` counts as ``a.b``.

    ``later`` counts also what importing the file does not: the inside of functions, and what types need.
    """
    waiting: list[ast.AST] = [ast.parse(source.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not later and (for_types or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            continue
        waiting.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = ("dit_jax", *source.relative_to(PACKAGE).parts)
            base = [*here[: len(here) - node.level], node.module] if node.level else [node.module]
            yield from (".".join([*filter(None, base), alias.name]) for alias in node.names)


def room_of(source: Path) -> str:
    return source.relative_to(PACKAGE).parts[0].removesuffix(".py")


def third_party(names: Iterator[str]) -> set[str]:
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"dit_jax"}


def core_dependencies() -> set[str]:
    """Import names of what ``pip install dit_jax`` brings by its own word."""
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    lines = setup["options"]["install_requires"].split("\n")
    names = [re.match(r"[\w-]+", line.strip()) for line in lines]
    return {IMPORT_NAME.get(name[0], name[0]) for name in names if name}


@each_source
def test_imports_only_go_down(source):
    room = room_of(source)
    assert room in MAY_IMPORT, f"{source.name} is a new room: give it a layer in MAY_IMPORT"
    ours = [name.split(".")[1] for name in imports(source, later=True) if name.startswith("dit_jax.")]
    used = {name for name in ours if name in MAY_IMPORT} - {room}
    assert used <= MAY_IMPORT[room], f"{room} may not import {sorted(used - MAY_IMPORT[room])}"


@each_source
def test_what_is_imported_at_the_top_is_a_core_dependency(source):
    undeclared = third_party(imports(source, later=False)) - core_dependencies()
    assert not undeclared, f"not in install_requires of setup.cfg: {sorted(undeclared)}"


@each_source
def test_rooms_that_promise_to_need_little_keep_the_promise(source):
    path = source.relative_to(PACKAGE).as_posix()
    for start, allowed in NEEDS_ONLY.items():
        if path.startswith(start):
            assert third_party(imports(source, later=True)) <= allowed


def test_every_core_dependency_is_used():
    used = set().union(*(third_party(imports(source, later=True)) for source in SOURCES))
    assert core_dependencies() <= used


def test_build_reads_encoders_and_data_only_when_asked():
    top = {".".join(name.split(".")[:2]) for name in imports(PACKAGE / "build.py", later=False)}
    assert not top & {"dit_jax.encoders", "dit_jax.data"}


def test_every_module_imports_without_the_optional_dependencies():
    program = f"""
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys({OPTIONAL}))  # None: importing it is an ImportError
import dit_jax
for module in pkgutil.walk_packages(dit_jax.__path__, "dit_jax."):
    importlib.import_module(module.name)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_of_a_program_does_not_wait_for_jax():
    """Nor for anything that is as slow to import."""
    program = """
import contextlib, importlib, sys
for name in ("main", "sample", "evaluate", "precompute", "export", "report", "doctor", "bench.__main__"):
    with contextlib.suppress(SystemExit):
        importlib.import_module(f"dit_jax.{name}").main(["--help"])
    slow = {"jax", "flax", "optax", "orbax", "transformers", "scipy", "tensorboard"} & sys.modules.keys()
    assert not slow, (name, slow)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: python -m dit_jax.") == 8
