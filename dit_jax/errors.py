"""Mistakes that a person can mend, and how a program ends on one: one line on stderr and an exit code.

=====  ==========================================  =====  =====================================
0      done                                        5      checkpoint unusable
1      internal error (a bug: traceback shown)     6      out of memory
2      usage or config                             130    interrupted (Ctrl-C)
3      data
4      diverged (loss or gradient not finite)
=====  ==========================================  =====  =====================================
"""

import sys
import traceback
from collections.abc import Callable


class UserError(Exception):
    """Base of errors that end a program in one line. The text says what failed, the value, and what mends it."""

    exit_code = 1
    kind = "error"


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


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another model."""

    exit_code = 5
    kind = "checkpoint error"


OUT_OF_MEMORY = 6
INTERRUPTED = 130


def run_program(main: Callable[[], None], show_traceback: bool = False) -> None:
    """Call ``main`` and exit as the table says; `UserError` becomes one line, everything else keeps its traceback."""
    try:
        main()
    except UserError as error:
        if show_traceback:
            traceback.print_exc()
        print(f"{error.kind}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        if show_traceback:
            traceback.print_exc()
        print(
            "out of memory: the device cannot hold this step; lower --config.batch_size, raise --config.accumulate"
            " or set --config.model.remat=dots (then full)",
            file=sys.stderr,
        )
        sys.exit(OUT_OF_MEMORY)
