"""How every program starts and ends: devices, compile cache, quiet libraries, exit codes.

=====  =======================================  =====  ==============================================
0      done                                     7      network or model fetch
1      internal error, with its traceback       8      workdir full or not writable
2      usage or config                          9      another process lost, or stalled
3      data                                     75     preempted (by a signal): start me again
4      diverged (loss or gradient not finite)   130    interrupted (Ctrl-C)
5      checkpoint unusable                      128+n  signal n came while an earlier one was obeyed
6      out of memory
=====  =======================================  =====  ==============================================
"""

import _thread
import argparse
import contextlib
import errno
import functools
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dit_jax import processes
from dit_jax.errors import SIGNALS, ConfigError, PreemptedError, Told, UserError, WorkdirError, is_ignored
from dit_jax.processes import Place

INTERNAL = 1
OUT_OF_MEMORY = 6
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
INTERRUPTED = 130
INSIST_EVERY = 0.5  # seconds after which what a signal raised is raised again, if it is lost
# What a full disk is called by the system and by tensorstore, whose messages begin with RESOURCE_EXHAUSTED too.
DISK_FULL = ("No space left", "os_error_code='28'", "Disk quota")


class _Ending:
    """How signals end a program: the first one lets it close what is open, one more ends it where it is.

    The first raises an exception. Callbacks of libraries lose exceptions now and then, so that it is raised again until
    it is on its way; and what is being imported makes an ImportError of it, so that `told` is kept.

    Python's handlers wait for its next instruction, and so for a compiler or a device. Therefore a thread counts the
    signals that the process gets, and ends it at the second one.

    Attributes:
      told: what was raised; None before the first signal.
      over: whether the program is through with what it does, and only says how it ended.
    """

    def __init__(self) -> None:
        self.told: BaseException | None = None
        self.over = self._insists = False
        self._own = 0  # signals that `_insist` sent, and that were not counted yet

    @contextlib.contextmanager
    def in_charge(self) -> Iterator[None]:
        """Have signals come here."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        before = {number: signal.signal(number, self) for number in SIGNALS if not is_ignored(number)}
        wakes = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._count, args=(reader,), daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakes)
            for number, handler in before.items():
                signal.signal(number, handler)
            writer.close()

    def _count(self, reader: socket.socket) -> None:
        """End the process at the second signal; return when nobody is in charge any more."""
        with reader:
            came = 0
            while numbers := reader.recv(64):
                for number in numbers:
                    if self._own:
                        self._own -= 1
                    elif number in SIGNALS:
                        came += 1
                        if came > 1:
                            os._exit(128 + number)

    def __call__(self, number: int, _: Any) -> None:
        """The handler."""
        if isinstance(sys.exception(), PreemptedError | KeyboardInterrupt) and self.told is None:
            os._exit(128 + number)  # `dit_jax.training.stop` obeyed the first
        if self.told is None:
            self.told = KeyboardInterrupt() if number == signal.SIGINT else Told(signal.Signals(number).name)
            if self.over:
                return  # it ends anyway
            _thread.start_new_thread(self._insist, (number,))  # takes no lock that this thread may hold
            raise self.told
        if not self._insists:
            os._exit(128 + number)
        self._insists = False
        if not self.over and not _is_handled(self.told):
            raise self.told

    def _insist(self, number: int) -> None:
        """Have the handler called again and again; once a run's own handler is there (`Stop`), that one, once."""
        ours = True
        while ours:
            time.sleep(INSIST_EVERY)
            ours = self._insists = signal.getsignal(number) == self
            if self.over:
                return
            self._own += 1
            if hasattr(signal, "pthread_kill"):  # Windows has none, and waits until what blocks is over
                signal.pthread_kill(threading.main_thread().ident or 0, number)
            else:
                _thread.interrupt_main(signal.Signals(number))


def _is_handled(error: BaseException) -> bool:
    """Whether this thread is in an ``except``, ``finally`` or ``__exit__`` because of an exception."""
    handled = sys.exception()
    while handled is not None and handled is not error:
        handled = handled.__context__
    return handled is error


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


def run_program(main: Callable[[], None], show_traceback: bool, less_memory: str) -> None:
    """Call ``main`` and exit as the table says; a `UserError` becomes one line, a bug keeps its traceback.

    ``less_memory`` is what the user of this program can do when the device's memory is not enough.
    """
    ending = _Ending()
    with ending.in_charge():
        _run(main, ending, show_traceback, less_memory)


def _run(main: Callable[[], None], ending: _Ending, show_traceback: bool, less_memory: str) -> None:
    try:
        try:
            main()
        finally:
            ending.over = True
        processes.finish()
    except UserError as error:
        _end(f"{error.kind}: {error}", error.exit_code, show_traceback, error.of_all)
    except KeyboardInterrupt as error:
        _end_told(error, show_traceback)
    except Told as told:
        _end_told(told, show_traceback)
    except Exception as error:
        if ending.told is not None:
            _end_told(ending.told, show_traceback)
        processes.blame(error)
        said = str(error)
        if any(sign in said for sign in DISK_FULL):
            full = f"{WorkdirError.kind}: the disk is full; make room and start again ({said.splitlines()[0]})"
            _end(full, WorkdirError.exit_code, show_traceback, False)
        if "RESOURCE_EXHAUSTED" not in said:
            if processes.count() > 1:
                traceback.print_exc()
                processes.leave(repr(error), INTERNAL)
            raise
        _end(f"out of memory: the device cannot hold this; {less_memory}", OUT_OF_MEMORY, show_traceback, False)


@contextlib.contextmanager
def writable(folder: Path) -> Iterator[None]:
    """What cannot be written ends the program with the folder's name."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise WorkdirError(f"cannot write to {folder}: {reason}; give another folder") from error


def _end(line: str, code: int, show_traceback: bool, of_all: bool) -> None:
    """``of_all``: every process of the run ends like this; else the others are told that this one does."""
    _say_end(line, show_traceback)
    if of_all:
        processes.finish()
    processes.leave(line, code)
    sys.exit(code)


def _end_at_once(line: str, code: int, show_traceback: bool, of_all: bool) -> NoReturn:
    """All that was open is closed; threads of XLA, which may compile still, must not see the process taken apart."""
    _say_end(line, show_traceback)
    if of_all:
        processes.finish()
    processes.leave(line, code)
    sys.stdout.flush()
    os._exit(code)


def _end_told(told: BaseException, show_traceback: bool) -> NoReturn:
    """The program ends because of a signal."""
    if isinstance(told, KeyboardInterrupt):
        agreed = bool(str(told))  # by `dit_jax.training.stop`, which says where the run stands
        _end_at_once(": ".join(filter(None, ["interrupted", str(told)])), INTERRUPTED, show_traceback, agreed)
    line = f"{PreemptedError.kind}: {told}; start the same command again"
    _end_at_once(line, PreemptedError.exit_code, show_traceback, False)


def _say_end(line: str, show_traceback: bool) -> None:
    if show_traceback:
        traceback.print_exc()
    # what a stranger's file is called, or says, must not write to a terminal as it likes
    shown = "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in line)
    print(shown, file=sys.stderr, flush=True)


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
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
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
