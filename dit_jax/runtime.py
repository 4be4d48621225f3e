"""How every program starts: flags, devices, the compile cache, quiet libraries. How it ends is in `dit_jax.ending`."""

import argparse
import errno
import functools
import logging
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dit_jax import processes
from dit_jax.errors import ConfigError
from dit_jax.processes import Place

IMPORTED = time.monotonic()
EVERY_KEY = "Any key of the config can be set, as --config.model.num_layers=12; configs/default.py lists them all."
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def program_parser(program: str, doc: str, epilog: str = "", **options: Any) -> argparse.ArgumentParser:
    """Of a program, by the docstring of its module: the first line says what it does, its commands are the examples."""
    commands = [line.strip() for line in doc.splitlines() if line.startswith("    python ")]
    examples = "\n".join(["examples:", *(f"  {command}" for command in commands)]) if commands else ""
    return argparse.ArgumentParser(
        prog=f"python -m dit_jax.{program}",
        description=doc.split("\n")[0],
        epilog="\n\n".join(filter(None, [epilog, examples])),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that every program has."""
    group = parser.add_argument_group("process")
    group.add_argument("--allow_cpu", action="store_true", help="run on CPU although there is an NVIDIA device")
    group.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    group.add_argument("-v", "--verbose", action="store_true", help="show what the libraries log")


def read_overrides(parser: argparse.ArgumentParser, rest: Sequence[str]) -> dict[str, str]:
    """Keys of a config and their values, as text, from the arguments ``--config.key=value`` or ``--config.key value``.

    ``rest`` is what the parser does not know; what is no such argument ends the program.
    """
    overrides, left = {}, list(rest)
    while left:
        flag, equals, value = left.pop(0).partition("=")
        if not flag.startswith("--config."):
            parser.error(f"unrecognized argument {flag}")
        if not equals:
            if not left:
                parser.error(f"{flag} needs a value")
            value = left.pop(0)
        overrides[flag.removeprefix("--config.")] = value
    return overrides


def path_of(text: str) -> Path:
    """A flag's path, in which ``~`` is the home folder: no shell expands it behind an equals sign."""
    return Path(text).expanduser()


def set_up(allow_cpu: bool, verbose: bool, place: Place | None = None, deterministic: bool = False) -> None:
    """Quiet the libraries, turn the compile cache on, make random numbers independent of sharding, check the device.

    Args:
      allow_cpu: run on CPU even beside an NVIDIA device.
      verbose: leave the libraries their voice.
      place: of this process among those of a run, whom it joins; None where it is alone.
      deterministic: keep XLA from what gives other bits every time on a GPU. It reads its flags once, when it starts.

    Raises:
      ConfigError: an NVIDIA device is present, but JAX would run on CPU and nobody asked for that.
      LostError: other processes do not come.
    """
    if not verbose:
        quiet_libraries()
    if deterministic:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = compile_cache()
        try:
            cache.mkdir(parents=True, exist_ok=True, mode=0o700)
            if hasattr(os, "getuid") and cache.stat().st_uid != os.getuid():  # Windows has none
                raise PermissionError(errno.EACCES, "it is another user's, and what is in it is run as code")
            cache.chmod(0o700)
            jax.config.update("jax_compilation_cache_dir", str(cache))
        except OSError as error:
            warnings.warn(f"nothing that is compiled is kept: {cache}: {error.strerror}", stacklevel=1)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # of what a start compiles, most is small: together that takes seconds
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_threefry_partitionable", True)
    if place:
        processes.start(place)
    if not allow_cpu and (overlooked := overlooked_gpu()):
        raise ConfigError(f"{overlooked}, or pass --allow_cpu")


def quiet_libraries() -> None:
    """Mute what libraries log and warn of."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    for name in ("jax", "orbax"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # what fails in a thread of Orbax is raised where the save is waited for, and need not be shown as it happens
    for name in ("absl", "asyncio", "gcsfs"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.showwarning = _show_warning
    sys.unraisablehook = functools.partial(_show_unraisable, sys.unraisablehook)


def compile_cache() -> Path:
    """Where compiled functions are kept: ``JAX_COMPILATION_CACHE_DIR``, or in the user's own cache folder, for this
    user only, as what is in it is run as code.
    """
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    own = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dit_jax" / "compiled"
    return Path(named) if named else own


def overlooked_gpu() -> str | None:
    """What there is and what to install, if JAX runs on CPU beside an NVIDIA device and nobody asked for that."""
    import jax

    if os.environ.get("JAX_PLATFORMS") == "cpu" or jax.default_backend() != "cpu":
        return None
    driver = nvidia_driver()
    return driver and (
        f"there is an NVIDIA device (driver {driver}), but JAX runs on CPU: pip install '.[cuda13]' (driver"
        " 580, compute capability 7.5, or newer) or '.[cuda12]' (driver 525)"
    )


def begun() -> float:
    """When this process began, on the clock of `time.monotonic`; where no system tells, when this file was imported."""
    try:  # Linux: in ticks since the machine was started, the 20th number behind the program's name
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):
        return IMPORTED
    return time.monotonic() - age


def say(line: str) -> None:
    """A line for the person who watches, at once."""
    print(line, flush=True)


def git_commit() -> str:
    """The commit of the tree that this package lies in, if it lies in one."""
    if shutil.which("git") is None:
        return "no git"
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "no git"


def _show_warning(message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
    """Our own warnings in one line each; those of libraries not at all."""
    if Path(filename).is_relative_to(Path(__file__).parent):
        print(f"warning: {message}", file=sys.stderr, flush=True)


def _show_unraisable(show: Callable[[Any], Any], what: Any) -> None:
    """What Python can only print, but for the many writes of a failed save that end when nobody waits any more."""
    if str(what.exc_value) != "Event loop is closed":
        show(what)


def nvidia_driver() -> str | None:
    """The version of the NVIDIA driver, or None where there is no device."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    first = answer.stdout.strip().splitlines()[:1]
    return first[0] if answer.returncode == 0 and first and first[0].split(".")[0].isdigit() else None
