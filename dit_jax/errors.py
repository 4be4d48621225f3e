"""How programs end before they are done: mistakes that a person can mend, and what asks a program to end.

It ends with a single line and the error's exit code.
"""

import signal

# What asks a program to end. Schedulers send SIGTERM and SIGUSR1 before they take a machine away, a terminal that is
# closed sends SIGHUP. Windows has not all of them.
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))


def is_ignored(number: int) -> bool:
    """Whether a program was started so that it outlives its terminal, as by nohup."""
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) == signal.SIG_IGN


class UserError(Exception):
    """Base of errors that end a program in one line. The text says what failed, the value, and what mends it."""

    exit_code = 1
    kind = "error"
    of_all = False  # whether every process of a run ends by it, at the same step


class ConfigError(UserError):
    """A flag, a config key or a value that cannot be."""

    exit_code = 2
    kind = "config error"


class DataError(UserError):
    """A data set that cannot be read or has too many bad records."""

    exit_code = 3
    kind = "data error"


class DivergedError(UserError):
    """The loss or its gradient is not finite."""

    exit_code = 4
    kind = "diverged"
    of_all = True


class WorkdirError(UserError):
    """A folder that cannot be written to, or is full."""

    exit_code = 8
    kind = "workdir error"


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another model."""

    exit_code = 5
    kind = "checkpoint error"


class FetchError(UserError):
    """Files of a hub that can neither be fetched nor found in the cache."""

    exit_code = 7
    kind = "fetch error"


class LostError(UserError):
    """Another process of the run, or the device, does not answer any more."""

    exit_code = 9
    kind = "lost"


class Told(BaseException):
    """A scheduler's signal, by its name; no Exception, so that nothing on the way takes it for one."""


class PreemptedError(UserError):
    """The program was told to end before it was done; what it had done is saved, and it can be started again."""

    exit_code = 75
    kind = "preempted"
    of_all = True
