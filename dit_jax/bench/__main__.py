"""The benchmarks as a program.

python -m dit_jax.bench memory --config=configs/small.py [--config.key=value ...]
python -m dit_jax.bench data   --config=configs/small.py [--config.data.source=cache:FOLDER]
python -m dit_jax.bench sampling --config=configs/small.py [--config.sample.grid=trailing]
python -m dit_jax.bench sampling --model=runs/quickstart [--count=1000]
"""

import argparse
import sys
from collections.abc import Sequence

from dit_jax.bench.data import data
from dit_jax.bench.memory import memory
from dit_jax.bench.sampling import mixture_errors, shapes_scores
from dit_jax.data.shapes_world import QUICK
from dit_jax.ending import run_program
from dit_jax.runtime import add_flags, read_overrides, set_up

MEASURES = {"memory": memory, "data": data, "sampling": mixture_errors}


def main(argv: Sequence[str] | None = None) -> None:
    """The program's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m dit_jax.bench",
        description="Measure what a model takes, and what samplers give.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "what",
        choices=MEASURES,
        help="memory: of the train step, by model.remat | data: speed, size of a cache | sampling: error of samplers",
    )
    measured = parser.add_mutually_exclusive_group(required=True)
    measured.add_argument("--config", help="FILE.py, FILE.py:key=value,key=value or a run's config.json")
    measured.add_argument("--model", help="sampling: a run, an export or a hub id; scores of the shapes world")
    parser.add_argument("--count", type=int, help=f"with --model: prompts of each class; default: {QUICK}")
    add_flags(parser)
    args, rest = parser.parse_known_args(argv)
    overrides = read_overrides(parser, rest)
    if args.model is not None and (args.what != "sampling" or overrides):
        parser.error("--model is for sampling, without --config")
    if args.count is not None and args.model is None:
        parser.error("--count needs --model")

    def measure() -> None:
        set_up(args.allow_cpu, args.verbose)
        if args.model is None:
            MEASURES[args.what](args.config, overrides)
        else:
            shapes_scores(args.model, QUICK if args.count is None else args.count)

    run_program(measure, args.traceback, "lower --config.batch_size, or raise --config.accumulate")


if __name__ == "__main__":
    main(sys.argv[1:])
