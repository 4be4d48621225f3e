"""That no process of a run waits for ever for one that is gone: who is left ends, in one line and with exit code 9.

A process whose neighbour is gone would stay in the next all-reduce, or at the next barrier. So two threads keep watch,
whatever the program is in, and end it

  * when another process said that it ends by an error, and which (`Vigil.leave`);
  * when another process gave no sign of life for `HEARTBEAT` seconds.

With process 0 goes the coordinator, JAX's service on its machine, and without that JAX's libraries abort the process at
once, with a stack of their own; a handler puts our line below it.
"""

import contextlib
import ctypes
import os
import re
import signal
import socket
import sys
import threading
import time
from typing import Any, NoReturn

from dit_jax.errors import LostError

HEARTBEAT = 30  # seconds without a sign of life after which a process counts as lost
PULSE = 2.0  # seconds between two looks at who is there
GRACE = 3.0  # seconds for an error that all processes have to be said by each, and for the last word of one to be heard
FOREVER = 10**6  # seconds; who is waited for is watched

LAST_WORD = "dit_jax/last_word"  # the key where a process that ends by an error says so
# What collectives say when a connection ends, and how whatever JAX's libraries say begins.
CUT = ("Connection closed by peer", "Connection reset by peer", "Socket closed", "Broken pipe")
STATUS = r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|NOT_FOUND)\b"


class Vigil:
    """Keeps watch from now on.

    Args:
      client: of JAX's coordinator.
      coordinator: HOST:PORT of it.
      processes: how many there are.
      me: which of them this one is.
    """

    def __init__(self, client: Any, coordinator: str, processes: int, me: int):
        self._client, self._coordinator, self._me = client, coordinator, me
        self._everyone = list(range(processes))
        self._last_word = ""  # of another process
        self._over = threading.Event()
        self._ending = threading.Lock()  # taken by the one thread that ends the process, and never given back
        self._on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)  # kept here: the C library does not
        _handle_abort(self._on_abort)
        self._threads = [threading.Thread(target=look, daemon=True) for look in (self._listen, self._watch)]
        for thread in self._threads:
            thread.start()

    def call_off(self) -> None:
        """From now on nobody's end is a loss: all have done what they had to do."""
        self._over.set()

    def end(self) -> None:
        """Return when nobody watches any more: in process 0, when all others have left. All have called it off."""
        if self._me == 0:
            self._client.key_value_set(LAST_WORD, "")
        for thread in self._threads:
            thread.join(HEARTBEAT)
        _handle_abort(None)

    def leave(self, line: str, code: int) -> NoReturn:
        """End this process by an error, of which the others are told."""
        self._ending.acquire()
        with contextlib.suppress(Exception):  # the coordinator may be gone
            word = f"process {self._me} ended with exit code {code} ({line})"
            self._client.key_value_set(LAST_WORD, word, True)
        if self._me == 0:
            time.sleep(GRACE + 1)  # with this process goes the coordinator
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # an ordinary end would wait for the others

    def is_cut(self, error: BaseException) -> bool:
        """Whether an error is what a collective says when a connection ends."""
        import jax

        return isinstance(error, jax.errors.JaxRuntimeError) and any(sign in str(error) for sign in CUT)

    def blame(self, error: Exception) -> None:
        """Where an error is the consequence of another process's end, end this one; else return.

        A collective fails as soon as a socket closes, which is before it is known why.
        """
        import jax

        if not isinstance(error, jax.errors.JaxRuntimeError):
            return
        if self.is_cut(error):
            time.sleep(GRACE)
            self._lost("it closed its connection")
        if re.match(STATUS, str(error)):
            time.sleep(HEARTBEAT + 3 * PULSE)  # by then `_watch` knows

    def _listen(self) -> None:
        """Wait for the last word of a process that ends by an error."""
        try:
            word = self._client.blocking_key_value_get(LAST_WORD, FOREVER * 1000)
        except Exception:
            return  # nobody speaks any more; who is there is for `_watch` to see
        if word:
            self._last_word = word
            time.sleep(GRACE)
            self._lost(word)

    def _watch(self) -> None:
        """Look who is there, until it is over."""
        others = {i for i in self._everyone if i != self._me}
        while True:
            try:
                lost = others - set(self._client.get_live_nodes(self._everyone))
            except Exception:
                lost = {0}
            if self._over.is_set():
                if lost == others or self._me:
                    return
            elif lost:
                time.sleep(GRACE)
                self._lost(f"no sign of life from process {', '.join(map(str, sorted(lost)))}")
            self._over.wait(PULSE)

    def _aborted(self, _: int) -> None:
        """Called by the C library, in whatever thread aborts."""
        if not answers(self._coordinator):
            self._lost(f"no sign of life from process 0, the coordinator at {self._coordinator}")
        _handle_abort(None)  # it was about something else

    def _lost(self, reason: str) -> NoReturn:
        """End the process, from whatever thread, because of another one."""
        self._ending.acquire()
        end(f"another process was lost: {self._last_word or reason}; start all of them again to go on")


def answers(address: str) -> bool:
    """Whether anybody does at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=GRACE).close()
    except OSError:
        return False
    return True


def end(line: str) -> NoReturn:
    """End the process as `LostError` does, from whatever thread."""
    os.write(2, f"{LostError.kind}: {line}\n".encode())
    os._exit(LostError.exit_code)


def _handle_abort(handler: Any) -> None:
    """Have the C library call a C function on SIGABRT: Python's own handlers come too late. None is its own way."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p) if handler else None)
