"""Several processes that are one run: how they find each other, what they agree on, and that none is left alone.

Process 0 is the first. It decides what only one can decide, says what is said and writes what is written, and its
machine has the coordinator: JAX's service through which processes find each other and leave values. Every process knows
the devices of all (``jax.devices()``), and every jitted step runs on all of them.

A process whose neighbour is gone would wait for ever in the next all-reduce. So two threads watch, whatever the program
is in, and end the process with the exit code of `LostError` in one line

  * when another process said that it ends by an error, and which (`leave`);
  * when another process gave no sign of life for `HEARTBEAT` seconds.

Where the coordinator itself is gone, libraries of JAX abort the process at once; a handler makes the same line of that.

Until `start` a process is alone: it is the first of one, and all of this returns at once. JAX is imported in the
functions, as programs set its environment before that.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dit_jax.errors import ConfigError, LostError

PATIENCE = 300.0  # seconds for all processes to come
HEARTBEAT = 30  # seconds without a sign of life after which a process counts as lost
PULSE = 2.0  # seconds between two looks at who is there
GRACE = 3.0  # seconds for an error that all processes have to be said by each, and for the last word of one to be heard
FOREVER = 10**6  # seconds; who is waited for is watched

ENDED = "dit_jax/ended"  # the key of the last word of a process that ends by an error
# What collectives say when a connection ends, and how all that JAX's libraries say begins.
CUT = ("Connection closed by peer", "Connection reset by peer", "Socket closed", "Broken pipe")
STATUS = r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|NOT_FOUND)\b"


class Place(NamedTuple):
    """Where a process stands in its run.

    Attributes:
      coordinator: HOST:PORT, where process 0 serves all.
      num_processes: of the run.
      process_id: of this one, from 0.
    """

    coordinator: str
    num_processes: int
    process_id: int


class _Group:
    """What this process knows of its run."""

    place = Place("", 1, 0)
    client: Any = None  # of JAX's service
    handler: Any = None  # of SIGABRT
    threads: list[threading.Thread] = []  # that watch
    last_word = ""  # of another process that ended by an error
    finished = threading.Event()  # nobody's end is a loss any more
    ending = threading.Lock()  # taken by the one thread that ends the process, never given back
    values = barriers = 0  # that were given to all, that were passed


_group = _Group()


def count() -> int:
    """How many processes are this run."""
    return _group.place.num_processes


def index() -> int:
    """Which of them this one is."""
    return _group.place.process_id


def is_first() -> bool:
    """Whether this process is the one that decides, says and writes."""
    return _group.place.process_id == 0


def own_rows(size: int) -> range:
    """The rows of a global batch of ``size`` that this process reads and hands in."""
    return rows_of(size, _group.place.process_id, _group.place.num_processes)


def rows_of(size: int, index: int, count: int) -> range:
    """The rows of process ``index`` of ``count``: equal shares, in their order."""
    return range(index * size // count, (index + 1) * size // count)


def own_copy(tree: Any) -> Any:
    """Arrays that lie whole on every device, as this process alone can compute with them: those of its first device."""
    import jax

    return tree if _group.client is None else jax.tree.map(lambda a: a.addressable_data(0), tree)


def own_file(path: Path) -> Path:
    """A file of which every process has its own: the first this one, process 2 ``name.2.suffix``."""
    return path if is_first() else path.with_suffix(f".{index()}{path.suffix}")


# --------------------------------------------------------------------------------------------------- begin and end


def start(place: Place, patience: float = PATIENCE) -> None:
    """Join the other processes; before anything else asks JAX for devices.

    Raises:
      LostError: they do not all come. From a thread, that ends the process: libraries of JAX may wait for them still.
      ConfigError: they do not have equally many devices.
    """
    if place.num_processes == 1:
        return
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    jax.config.update("jax_enable_recoverability", True)  # that one is lost is for `_watch` to say, not for an abort
    late = threading.Timer(patience, _never_began, (place, patience))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.num_processes,
            place.process_id,
            cluster_detection_method="deactivate",  # the flags say all; a scheduler's variables must not mix in
            initialization_timeout=FOREVER,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise LostError(
            f"process {place.process_id} cannot begin at {place.coordinator}: {reason}; is the port free?"
        ) from error
    finally:
        late.cancel()
    from jax._src import distributed  # its client has no public name; Orbax takes it from here too

    _group.place, _group.client = place, distributed.global_state.client
    _handle_abort(_on_abort)
    _group.threads = [threading.Thread(target=look, daemon=True) for look in (_listen, _watch)]
    for thread in _group.threads:
        thread.start()
    _introduce()
    devices = [sum(d.process_index == p for d in jax.devices()) for p in range(place.num_processes)]
    if len(set(devices)) > 1:
        raise ConfigError(f"the processes have {devices} devices, and must have equally many to share a batch")


def _introduce() -> None:
    """Say where this process runs; from then on the first alone is heard on stdout, and every one on stderr."""
    import jax

    here = jax.local_devices()
    print(f"process {index()} of {count()}: {socket.gethostname()}, {len(here)} x {here[0].device_kind}", flush=True)
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 until the process ends


def finish() -> None:
    """Part from the others, who are at their end too; the coordinator goes last."""
    if _group.client is None:
        return
    import jax

    barrier()
    _group.finished.set()
    barrier()  # nobody leaves while another still takes that for a loss
    if is_first():
        _group.client.key_value_set(ENDED, "")
    for thread in _group.threads:  # that of the first returns when all others have left
        thread.join(HEARTBEAT)
    jax.distributed.shutdown()
    _handle_abort(None)
    _group.client = None


def leave(line: str, code: int) -> None:
    """End this process by an error, of which the others are told; returns where there are none.

    It does not wait for them as an ordinary end would.
    """
    if _group.client is None:
        return
    _group.ending.acquire()
    with contextlib.suppress(Exception):  # the coordinator may be gone
        _group.client.key_value_set(ENDED, f"process {index()} ended with exit code {code} ({line})", True)
    if is_first():
        time.sleep(GRACE + 1)  # with this process goes the coordinator
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def blame(error: Exception) -> None:
    """Where an error is the consequence of another process's end, end this one; else return.

    A collective fails as soon as a socket closes, which is before it is known why.
    """
    if _group.client is None:
        return
    if any(sign in str(error) for sign in CUT):
        time.sleep(GRACE)
        _end("it closed its connection")
    if re.match(STATUS, str(error)):
        time.sleep(HEARTBEAT + 3 * PULSE)  # by then `_watch` knows


# ------------------------------------------------------------------------------------------------------ agreement


def barrier() -> None:
    """Return when all processes are here."""
    if _group.client is None:
        return
    _group.barriers += 1
    _group.client.wait_at_barrier(f"dit_jax/barrier/{_group.barriers}", FOREVER * 1000)


def of_first(value: Any) -> Any:
    """A value of the first process, as JSON can say it, for all; what the others pass does not count."""
    if _group.client is None:
        return value
    _group.values += 1
    key = f"dit_jax/value/{_group.values}"
    if is_first():
        _group.client.key_value_set(key, json.dumps(value))
    return json.loads(_group.client.blocking_key_value_get(key, FOREVER * 1000))


class Agreement:
    """The largest of the numbers that all processes say after a step, heard after the next one.

    So no device waits for it: when the answer is fetched, the step behind it is on its way. Every process asks equally
    often, and all get the same answers.
    """

    def __init__(self) -> None:
        import jax

        from dit_jax.sharding import batch_sharding, make_mesh, replicated

        mesh = make_mesh(jax.devices())
        self._here, self._spread = jax.local_device_count(), batch_sharding(mesh)
        self._largest = jax.jit(lambda numbers: numbers.max(), out_shardings=replicated(mesh))
        self._late: jax.Array | None = None  # the answer that is to be fetched

    def __call__(self, number: int) -> int:
        """Say a number, 0 or more, after a step; returns the largest of the step before, 0 at first."""
        import jax

        mine = np.full(self._here, number, np.int32)
        late, self._late = self._late, self._largest(jax.make_array_from_process_local_data(self._spread, mine))
        return 0 if late is None else int(late)


def agreement() -> Agreement | None:
    """What the processes agree by; None where there is no other."""
    return None if _group.client is None else Agreement()


# -------------------------------------------------------------------------------------------- watching the others


def _listen() -> None:
    """Wait for the last word of a process that ends by an error."""
    try:
        word = _group.client.blocking_key_value_get(ENDED, FOREVER * 1000)
    except Exception:
        return  # nobody speaks any more; who is there is for `_watch` to see
    if word:
        _group.last_word = word
        time.sleep(GRACE)  # an error of all processes is said by each, with its own exit code
        _end(word)


def _watch() -> None:
    """Look who is there, until all have finished; the first stays until the others have left."""
    others = set(range(count())) - {index()}
    while True:
        try:
            lost = others - set(_group.client.get_live_nodes(list(range(count()))))
        except Exception:
            lost = {0}
        if _group.finished.is_set():
            if lost == others or not is_first():
                return
        elif lost:
            time.sleep(GRACE)
            _end(f"no sign of life from process {', '.join(map(str, sorted(lost)))}")
        _group.finished.wait(PULSE)


def _on_abort(_: int) -> None:
    """The coordinator is gone: then JAX's libraries abort, which no handler of Python's own is in time for."""
    if not _answers(_group.place.coordinator):
        _end(f"no sign of life from process 0, the coordinator at {_group.place.coordinator}")
    _handle_abort(None)  # it was about something else


def _handle_abort(handler: Callable[[int], None] | None) -> None:
    """Have the C library call a function on SIGABRT, in whatever thread that comes; None is its own way."""
    as_c = ctypes.CFUNCTYPE(None, ctypes.c_int)
    _group.handler = as_c(handler) if handler else as_c(0)  # kept: the library does not
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, as_c), ctypes.c_void_p
    libc.signal(signal.SIGABRT, _group.handler)


def _end(reason: str) -> None:
    """End the process, from whatever thread, because of another one."""
    _group.ending.acquire()
    lost = f"another process was lost: {_group.last_word or reason}; start all of them again to go on"
    os.write(2, f"{LostError.kind}: {lost}\n".encode())
    os._exit(LostError.exit_code)


def _never_began(place: Place, patience: float) -> None:
    """End the process, as not all have come."""
    missing = f"not all of the {place.num_processes} processes came to {place.coordinator}, which answers"
    if not _answers(place.coordinator):
        missing = f"process 0 does not answer at {place.coordinator}; is it started, and can this machine reach it?"
    os.write(2, f"{LostError.kind}: process {place.process_id} waited {patience:g} seconds: {missing}\n".encode())
    os._exit(LostError.exit_code)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=GRACE).close()
    except OSError:
        return False
    return True
