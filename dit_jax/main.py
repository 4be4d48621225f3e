"""Trains: ``python -m dit_jax.main --config=configs/small.py [--workdir=DIR] [--config.key=value ...]``.

The same command again goes on where the last checkpoint ends. With ``--dry_run`` it says what the run would be and
need, and trains nothing.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dit_jax.config import is_export, load_config
from dit_jax.runtime import add_flags, read_overrides, run_program, set_up
from dit_jax.stores import folder_of


def main(argv: Sequence[str] | None = None) -> None:
    """Flags, and one call to `dit_jax.train.run`."""
    parser = argparse.ArgumentParser(
        prog="python -m dit_jax.main",
        description="Train a model; the same command again resumes.",
        epilog="Any key of the config can be set: --config.batch_size=32 --config.model.num_layers=12."
        " configs/default.py lists all keys.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="FILE.py, FILE.py:key=value,key=value or a run's config.json")
    parser.add_argument(
        "--workdir",
        help="folder of the run, or gs://bucket/folder; default: runs/<config name>, or where the config.json lies",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="print config, parameters, cost and memory of the run, and train nothing"
    )
    parser.add_argument("--device", help="with --dry_run: what fits on a 4090, t4, h100, h200 or v5e")
    add_flags(parser)
    args, rest = parser.parse_known_args(argv)
    overrides = read_overrides(parser, rest)
    if args.device is not None and not args.dry_run:
        parser.error("--device goes with --dry_run; a run takes the devices that are there")

    def train() -> None:
        config = load_config(args.config, overrides)
        set_up(args.allow_cpu or args.device is not None, args.verbose)
        from dit_jax import dry_run, train

        if args.dry_run:
            dry_run.report(config, args.config, args.device)
            return
        train.run(config, folder_of(args.workdir) if args.workdir else default_workdir(args.config))

    less_memory = "lower batch_size, raise accumulate, or set model.remat to dots (then full)"
    run_program(train, args.traceback, less_memory)


def default_workdir(config: str) -> Path:
    """``runs/<config name>``, or the run that a ``config.json`` lies in; that of an export begins a new run."""
    path = Path(config.partition(":")[0])
    if path.suffix == ".json" and not is_export(path):
        return path.parent
    return Path("runs") / (path.stem if path.suffix != ".json" else path.absolute().parent.name)


if __name__ == "__main__":
    main(sys.argv[1:])
