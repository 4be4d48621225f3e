"""Trains a model; the same command again goes on where it stopped.

    python -m dit_jax.main --config=configs/quickstart.py
    python -m dit_jax.main --config=configs/small.py --workdir=runs/mine --config.batch_size=32
    python -m dit_jax.main --config=configs/small.py --dry_run --device=4090
    python -m dit_jax.main --config=configs/xl.py --coordinator=auto --workdir=/shared/runs/xl

With ``--dry_run`` it says what the run would be and need, and trains nothing.
"""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from dit_jax.config import is_export, load_config, name_of
from dit_jax.ending import run_program
from dit_jax.errors import ConfigError
from dit_jax.processes import ANYWHERE, Place
from dit_jax.runtime import EVERY_KEY, add_flags, begun, program_parser, read_overrides, set_up
from dit_jax.stores import folder_of


def main(argv: Sequence[str] | None = None) -> None:
    """Flags, and one call to `dit_jax.train.run`."""
    parser = program_parser("main", __doc__, EVERY_KEY, allow_abbrev=False)
    parser.add_argument("--config", required=True, help="FILE.py, FILE.py:key=value,key=value or a run's config.json")
    parser.add_argument(
        "--workdir",
        help="folder of the run, or gs://bucket/folder; default: runs/<config name>, or where the config.json lies",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="print config, parameters, cost and memory of the run, and train nothing"
    )
    parser.add_argument(
        "--extend", action="store_true", help="let a run that is there become longer by a larger --config.total_steps"
    )
    parser.add_argument("--device", help="with --dry_run: what fits on a 4090, t4, h100, h200 or v5e")
    several = parser.add_argument_group("several processes that are one run, with all three flags or auto")
    several.add_argument(
        "--coordinator",
        metavar="HOST:PORT|auto",
        help="where process 0 runs, and a free port there; auto: Slurm, Open MPI, Kubernetes or Cloud TPU says all",
    )
    several.add_argument("--num_processes", type=int, metavar="N", help="how many there are")
    several.add_argument("--process_id", type=int, metavar="I", help="which this one is, 0 to N - 1")
    add_flags(parser)
    args, rest = parser.parse_known_args(argv)
    overrides = read_overrides(parser, rest)
    if args.device is not None and not args.dry_run:
        parser.error("--device goes with --dry_run; a run takes the devices that are there")

    config: ConfigDict | None = None

    def train() -> None:
        nonlocal config
        config = load_config(args.config, overrides)
        place = read_place(args.coordinator, args.num_processes, args.process_id)
        if place and args.dry_run:
            raise ConfigError("--dry_run is for one process; leave --coordinator, --num_processes and --process_id out")
        set_up(args.allow_cpu or args.device is not None, args.verbose, place, config.deterministic)
        from dit_jax import dry_run, train

        if args.dry_run:
            dry_run.report(config, args.config, args.device)
            return
        workdir = folder_of(args.workdir) if args.workdir else default_workdir(args.config)
        train.run(config, workdir, extend=args.extend, begun=begun())

    def less_memory() -> str:
        with contextlib.suppress(Exception):  # what explains an error must not become another one
            from dit_jax import dry_run

            return dry_run.advice(config)
        return "lower batch_size, raise accumulate, or set model.remat to dots (then full)"

    run_program(train, args.traceback, less_memory)


def read_place(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Place | None:
    """What the flags of several processes say; None without them.

    Raises:
      ConfigError: only some of them, or such as cannot be.
    """
    if coordinator is None and num_processes is None and process_id is None:
        return None
    if coordinator == ANYWHERE.coordinator and num_processes is None and process_id is None:
        return ANYWHERE
    if coordinator is None or num_processes is None or process_id is None:
        raise ConfigError("--coordinator, --num_processes and --process_id go together: give all three, or none")
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdigit() and 0 < int(port) < 2**16):
        raise ConfigError(f"--coordinator is {coordinator!r}; it must be HOST:PORT")
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise ConfigError(
            f"--process_id={process_id} of --num_processes={num_processes}: ids count from 0 to num_processes - 1"
        )
    return Place(coordinator, num_processes, process_id)


def default_workdir(config: str) -> Path:
    """``runs/<config name>``, or the run that a ``config.json`` lies in; that of an export begins a new run."""
    path = Path(config.partition(":")[0]).expanduser()
    if path.suffix == ".json" and not is_export(path):
        return path.parent
    return Path("runs") / name_of(config)


if __name__ == "__main__":
    main(sys.argv[1:])
