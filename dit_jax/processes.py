"""Several processes that are one run: how they find each other, what they agree on, and how they part.

Process 0 is the first. It decides what only one can decide, says what is said and writes what is written, and its
machine has the coordinator: JAX's service through which processes find each other and leave values. Every process knows
the devices of all (``jax.devices()``), and every jitted step runs on all of them.

What happens when one of them is lost: `dit_jax.vigil`.

Until `start` a process is alone: it is the first of one, and all of this returns at once. JAX is imported in the
functions, as programs set its environment before that.
"""

import json
import os
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dit_jax.errors import ConfigError, LostError
from dit_jax.vigil import FOREVER, HEARTBEAT, Vigil, answers, end

PATIENCE = 300.0  # seconds for all processes to come


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


ANYWHERE = Place("auto", 0, 0)


class _Group:
    """What this process knows of its run."""

    place = Place("", 1, 0)
    client: Any = None  # of JAX's coordinator; None where the process is alone
    vigil: Vigil
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
    """Join the other processes; before anything else asks JAX for devices. The scheduler says where `ANYWHERE` is.

    Raises:
      LostError: they do not all come. From a thread, that ends the process: libraries of JAX may wait for them still.
      ConfigError: they do not have equally many devices.
    """
    place, devices_here = _found(patience) if place == ANYWHERE else (place, None)
    if place.num_processes == 1:
        return
    import jax

    if hasattr(jax.config, "jax_enable_preemption_service"):  # older ones have no such option
        jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    jax.config.update("jax_enable_recoverability", True)  # that one is lost is for `Vigil` to say
    late = threading.Timer(patience, _never_began, (place, patience))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.num_processes,
            place.process_id,
            devices_here,
            cluster_detection_method="deactivate",  # that was done, or must not mix in
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
    _group.vigil = Vigil(_group.client, *place)
    _introduce()
    devices = [sum(d.process_index == p for d in jax.devices()) for p in range(place.num_processes)]
    if len(set(devices)) > 1:
        raise ConfigError(f"the processes have {devices} devices, and must have equally many to share a batch")


def _found(patience: float) -> tuple[Place, Sequence[int] | None]:
    """Where the scheduler put this process, and which devices of its machine are its own; None: all of them."""
    from jax._src.clusters import ClusterEnv  # Slurm, Open MPI, Kubernetes and Cloud TPU; it has no public name

    found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(patience))
    coordinator, num_processes, process_id, devices = found
    if coordinator is None or num_processes is None or process_id is None:
        raise ConfigError(
            "--coordinator=auto finds neither Slurm (srun), Open MPI (mpirun), Kubernetes nor a Cloud TPU here; say"
            " --coordinator=HOST:PORT --num_processes=N --process_id=I"
        )
    return Place(coordinator, num_processes, process_id), devices


def _never_began(place: Place, patience: float) -> None:
    """End the process, as not all have come."""
    missing = f"not all of the {place.num_processes} processes came to {place.coordinator}, which answers"
    if not answers(place.coordinator):
        missing = f"process 0 does not answer at {place.coordinator}; is it started, and can this machine reach it?"
    end(f"process {place.process_id} waited {patience:g} seconds: {missing}")


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
    _group.vigil.call_off()
    barrier()  # nobody leaves while another still takes that for a loss
    _group.vigil.end()
    jax.distributed.shutdown()
    _group.client = None


def leave(line: str, code: int) -> None:
    """End this process by an error, of which the others are told; returns where there are none."""
    if _group.client is not None:
        _group.vigil.leave(line, code)


def is_cut(error: BaseException) -> bool:
    """Whether an error is what a collective says when another process is gone."""
    return _group.client is not None and _group.vigil.is_cut(error)


def blame(error: Exception) -> None:
    """Where an error is the consequence of another process's end, end this one; else return."""
    if _group.client is not None:
        _group.vigil.blame(error)


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
