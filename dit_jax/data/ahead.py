"""Working ahead of whoever waits: by threads, by processes, in order, and never for ever.

Three ways that keep the order of what they are given, so that nothing depends on who is quick: `in_threads`,
`in_processes`, and `ahead`, which runs any iterator in a thread of its own. Where nothing comes for ``patience``
seconds (0 waits for ever), the one who waits gets a `DataError`. Threads are daemons and processes are killed: a read
that never returns keeps no program from ending, as it does with the executors of the standard library and with Grain,
which wait for it. A process whose parent is gone ends by itself. One that dies is started again where it was, since an
item is the same whoever makes it; if that dies too before it has made anything, it ends in a `DataError` as well.
Results come through pipes: /dev/shm, of which a container has little, is left alone.
"""

import atexit
import collections
import contextlib
import itertools
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from dit_jax.errors import SIGNALS, DataError, UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

THREADS = 8  # that read and decode pictures, in every process that does
PIPE = 2**20  # bytes; no more is given to those without privileges
CLOSING = 5.0  # seconds that those who are told to stop are waited for


def in_threads(
    make: Callable[[Item], Result], items: Iterable[Item], threads: int, depth: int, patience: float, what: str
) -> Generator[Result, None, None]:
    """Yields ``make(item)`` for each item, in their order.

    Args:
      make: called by several threads at a time.
      items: what to call it with.
      threads: how many; 0 calls it here, when a result is asked for.
      depth: results that may be waiting or under way.
      patience: seconds to wait for the next result.
      what: is waited for, for the message.

    Raises:
      DataError: nothing came.
    """
    if not threads:
        yield from map(make, items)
        return
    todo: queue.SimpleQueue[tuple[Future[Result], Item] | None] = queue.SimpleQueue()

    def work() -> None:
        while (task := todo.get()) is not None:
            future, item = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(make(item))
            except BaseException as error:
                future.set_exception(error)

    waiting = iter(items)
    coming: collections.deque[Future[Result]] = collections.deque()

    def begin(count: int) -> None:
        for item in itertools.islice(waiting, count):
            coming.append(Future())
            todo.put((coming[-1], item))

    for _ in range(threads):
        threading.Thread(target=work, daemon=True).start()
    try:
        begin(depth)
        while coming:
            future = coming.popleft()
            try:
                result = future.result(patience or None)
            except TimeoutError:
                if future.done():  # its own error
                    raise
                raise DataError(_nothing_came(what, patience)) from None
            begin(1)
            yield result
    finally:
        for future in coming:
            future.cancel()
        for _ in range(threads):
            todo.put(None)


def gathered(make: Callable[[int], Result], first: int, last: int, threads: int) -> Generator[Result, None, None]:
    """Yields ``make(first)`` to ``make(last - 1)``, in order, made by threads that are a little ahead."""
    return in_threads(make, range(first, last), threads, 2 * threads, 0, "")


# --- processes ----------------------------------------------------------------------------------------------


def in_processes(
    make: Callable[[Any], Result],
    items: Sequence[Any] | np.ndarray,
    workers: int,
    threads: int,
    depth: int,
    patience: float,
    what: str,
) -> Generator[Result, None, None]:
    """Yields ``make(item)`` for each item, in their order, like `in_threads`.

    Args:
      make: can be pickled, as can its results; what it raises is raised here, as a `DataError` if it is no UserError.
      items: what to call it with, dealt out in turn.
      workers: processes, each with its own ``threads`` and ``depth``.
      threads, depth, patience, what: as above.

    Raises:
      DataError: nothing came, ``make`` failed, or a process died before its next result, and the one in its place too.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads of this process hold
    workers = min(workers, len(items))
    started: list[tuple[Connection, BaseProcess]] = []

    def start(first: int) -> tuple[Connection, BaseProcess]:
        """A worker that makes item ``first`` and those of the following that are its own."""
        reader, writer = context.Pipe(duplex=False)
        _widen(writer)
        process: BaseProcess = context.Process(
            target=_serve, args=(writer, make, items[first::workers], threads, depth), daemon=True
        )
        with _signals_held():
            process.start()
        writer.close()  # the worker has the only one: its end is the end of the pipe
        return reader, process

    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        for _, process in started:
            process.kill()

    atexit.register(stop)  # a thread that waits for a worker may never come to its end
    try:
        for w in range(workers):
            started.append(start(w))
        for i in range(len(items)):
            try:
                result = _receive(*started[i % workers], patience, what)
            except _Died as died:
                if stopped.is_set():  # we have killed it
                    raise
                warnings.warn(f"{died}; it is started again, at item {i:,}", stacklevel=1)
                started[i % workers][0].close()
                started[i % workers] = start(i)
                result = _receive(*started[i % workers], patience, what)
            yield result
    finally:
        atexit.unregister(stop)
        stop()
        for reader, process in started:
            process.join(CLOSING)
            reader.close()


def _widen(pipe: Connection) -> None:
    """Lets a pipe hold a picture or a few, where the system can; of the usual 64 KiB a picture comes in pieces."""
    with contextlib.suppress(ImportError, AttributeError, OSError):  # as Linux can
        import fcntl

        fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, PIPE)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Processes that are started here never get these signals.

    Ctrl-C and schedulers signal every process of a run. What is to be done is for the parent to say, who may need its
    workers until it is done.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Failed(NamedTuple):
    """What a worker sends in place of a result where there is none."""

    error: BaseException


class _Died(DataError):
    """A worker is gone, perhaps by no fault of its own."""


def _receive(reader: Connection, process: BaseProcess, patience: float, what: str) -> Any:
    try:
        if not reader.poll(patience or None):
            raise DataError(_nothing_came(what, patience))
        result = reader.recv()
    except (EOFError, OSError):
        process.join(CLOSING)
        raise _Died(f"{what}: a worker process {_end(process.exitcode)}") from None
    if isinstance(result, _Failed):
        if isinstance(result.error, UserError):
            raise result.error
        said = " ".join(f"{type(result.error).__name__}: {result.error}".split())
        raise DataError(f"{what}: a worker process failed: {said} (--traceback shows where)") from result.error
    return result


def _end(exit_code: int | None) -> str:
    """How a process ended, in words."""
    if exit_code is None or exit_code >= 0:
        return f"ended with exit code {exit_code}"
    advice = ", most likely for want of memory: try fewer data.workers" if exit_code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-exit_code).name}{advice}"


def _serve(
    writer: Connection, make: Callable[[Any], Any], items: Sequence[Any] | np.ndarray, threads: int, depth: int
) -> None:
    """The life of a worker: it waits where the pipe is full, and ends when that is closed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(BrokenPipeError):
        try:
            for result in in_threads(make, items, threads, depth, 0, ""):
                writer.send(result)
        except BrokenPipeError:
            raise
        except BaseException as error:
            writer.send(_Failed(_that_travels(error)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # a thread may be in a read that never returns


def _that_travels(error: BaseException) -> BaseException:
    """The error with its traceback as a note, or one that says the same if it cannot be pickled."""
    if isinstance(error, SystemExit):  # of the worker: the parent shall not end as if it had been told to
        error = RuntimeError(f"a worker process was told to exit: {error!r}")
    error.add_note(f"In a worker process:\n{traceback.format_exc()}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(repr(error))
    return error


# --- an iterator in a thread of its own ---------------------------------------------------------------------


class ahead(Generic[Result]):
    """The items of an iterator, of which a thread keeps some ready; used as a function, like `contextlib.closing`.

    Args:
      iterator: runs in the thread; a generator is closed there.
      depth: items that are kept ready.
      patience: seconds to wait for the next one.
      what: is waited for, for the message.

    What the iterator raises is raised where its item would have come. Close this one when it is left early.
    """

    def __init__(self, iterator: Iterator[Result], depth: int, patience: float, what: str):
        self._depth, self._patience, self._what = depth, patience, what
        self._ready: collections.deque[Result] = collections.deque()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._ended = self._closed = False
        self._thread = threading.Thread(target=self._run, args=(iterator,), daemon=True)
        self._thread.start()

    def _run(self, iterator: Iterator[Result]) -> None:
        error = None
        try:
            for item in iterator:
                with self._changed:
                    self._ready.append(item)
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._closed or len(self._ready) < self._depth)
                    if self._closed:
                        break
            if isinstance(iterator, Generator):
                iterator.close()
        except BaseException as raised:
            error = raised
        with self._changed:
            self._error, self._ended = error, True
            self._changed.notify_all()

    def __iter__(self) -> "ahead[Result]":
        return self

    def __next__(self) -> Result:
        with self._changed:
            came = self._changed.wait_for(lambda: self._ready or self._ended or self._closed, self._patience or None)
            if not came:
                self._closed = True
                raise DataError(_nothing_came(self._what, self._patience))
            if self._ready:
                self._changed.notify_all()
                return self._ready.popleft()
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            raise StopIteration

    def close(self) -> None:
        """Stop the thread; one that is in the middle of an item gets a few seconds to finish it."""
        with self._changed:
            patient = not self._closed  # who has waited in vain does not wait again
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        if patient:
            self._thread.join(CLOSING)


def _nothing_came(what: str, patience: float) -> str:
    return (
        f"{what}: nothing came for {patience:g} seconds; does the disk or the network answer?"
        " (data.patience: how long to wait, 0 for ever)"
    )
