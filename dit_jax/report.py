"""Writes the page of a run again, by what lies in its workdir.

    python -m dit_jax.report --workdir=runs/quickstart

A run writes its page itself (`dit_jax.metrics.report`); this is for one that is older than that, was killed, or lies
where files were changed.
"""

import sys
from collections.abc import Sequence

from dit_jax.ending import run_program
from dit_jax.errors import CheckpointError, WorkdirError
from dit_jax.runtime import program_parser, quiet_libraries
from dit_jax.stores import folder_of
from dit_jax.workdir import METRICS, open_workdir


def main(argv: Sequence[str] | None = None) -> None:
    """The program's flags."""
    parser = program_parser("report", __doc__)
    parser.add_argument("--workdir", required=True, help="folder of the run, or gs://bucket/folder")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)

    def report() -> None:
        quiet_libraries()
        from dit_jax.duties import make_page_again
        from dit_jax.metrics.report import PAGE

        with open_workdir(folder_of(args.workdir)) as workdir:
            if not (workdir.folder / METRICS).is_file():
                raise CheckpointError(f"no run in {workdir.place}: there is no {METRICS}")
            if warning := make_page_again(workdir):
                raise WorkdirError(warning)
        print(workdir.place / PAGE)

    run_program(report, args.traceback, "it needs next to none")


if __name__ == "__main__":
    main(sys.argv[1:])
