"""Measures speed, memory, data and samplers, beside PyTorch where it is there.

    python -m dit_jax.bench train     --preset=small --ref=torch --json=train.json
    python -m dit_jax.bench ablation  --preset=small --batch=8
    python -m dit_jax.bench compile   --preset=s2
    python -m dit_jax.bench attention --preset=b2 --dtype=bfloat16
    python -m dit_jax.bench shard     --preset=xl2 --devices=64 --batch=32
    python -m dit_jax.bench sample    --preset=small --steps=20 --ref=torch

    python -m dit_jax.bench memory    --config=configs/small.py --config.model.remat=dots
    python -m dit_jax.bench data      --config=configs/small.py --config.data.source=cache:caches/mine
    python -m dit_jax.bench sampling  --config=configs/small.py --config.sample.grid=trailing
    python -m dit_jax.bench sampling  --model=runs/quickstart --count=1000

The first six measure the train step and the sampler on made-up latents; they need jax, flax, optax and ml_collections
alone, and torch to compare with it.
"""

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from dit_jax.ending import run_program
from dit_jax.runtime import add_flags, path_of, program_parser, read_overrides, set_up

OF_CONFIGS = {"memory": "memory", "data": "data", "sampling": "mixture_errors"}  # function of the file of that name
OF_PRESETS = {
    "train": "speed, MFU and memory of the train step",
    "ablation": "the train step with and without each of the choices that make it fast",
    "compile": "seconds and instructions of the train step, where nothing is cached and where it is",
    "attention": "the ways to compute it",
    "shard": "what the train step moves between devices that need not be there, by the way that they share it",
    "sample": "latency and images/s of the guided sampler",
}
PRESETS = ("small", "s2", "b2", "l2", "xl2")
DTYPES = ("float32", "bfloat16")
ROUNDS = 12


def main(argv: Sequence[str] | None = None) -> None:
    """The program's flags."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in OF_PRESETS:
        _measure_preset(argv)
    else:
        _measure_config(argv)


def _measure_preset(argv: Sequence[str]) -> None:
    """Flags of what is measured on made-up latents."""
    what = argv[0]
    commands = [line for line in __doc__.splitlines() if f"bench {what} " in line and "--preset" in line]
    parser = program_parser(f"bench {what}", "\n".join([OF_PRESETS[what], *commands]), allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, required=True, help="size of the model; b2 is DiT-B/2")
    of_all, of_one = "pictures a step; default: by preset", "pictures a step of each device; default: by preset"
    of_batch = {"sample": "pictures at once; default: 64, on a CPU 4", "shard": of_one}.get(what, of_all)
    parser.add_argument("--batch", type=_positive, help=of_batch)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the arithmetic")
    if what == "shard":
        parser.add_argument("--devices", type=_positive, default=8, help="how many share the step; default: 8")
    elif what != "compile":
        parser.add_argument("--rounds", type=_positive, default=ROUNDS, help="how often each candidate is timed")
    if what == "sample":
        parser.add_argument("--steps", type=_positive, default=20, help="of the sampler; default: 20")
    if what in ("train", "sample"):
        parser.add_argument("--ref", choices=["torch"], help="do the same with PyTorch, and compare")
    parser.add_argument("--json", type=path_of, metavar="FILE", help="write what is measured as JSON too")
    add_flags(parser)
    args = parser.parse_args(argv[1:])

    def measure() -> None:
        set_up(args.allow_cpu or what == "shard", args.verbose)
        from dit_jax.bench import presets, report

        batch = args.batch or presets.PRESETS[args.preset].batch
        report.report(_lines(what, args, batch), args.json)

    run_program(measure, args.traceback, "give a smaller --batch")


def _lines(what: str, args: argparse.Namespace, batch: int) -> Iterator[tuple[str, Any]]:
    """Lines to print, with what they say as data."""
    if what == "train":
        from dit_jax.bench.train import measure_training

        return measure_training(args.preset, batch, args.dtype, args.rounds, args.ref == "torch")
    if what == "ablation":
        from dit_jax.bench.ablation import measure_ablation

        return measure_ablation(args.preset, batch, args.dtype, args.rounds)
    if what == "compile":
        from dit_jax.bench.compiling import measure_compiling

        return measure_compiling(args.preset, batch, args.dtype)
    if what == "shard":
        from dit_jax.bench.shard import measure_sharding

        return measure_sharding(args.preset, batch, args.dtype, args.devices)
    if what == "sample":
        from dit_jax.bench.sample import measure_sampling

        return measure_sampling(args.preset, args.batch, args.dtype, args.steps, args.rounds, args.ref == "torch")
    from dit_jax.bench.attention import measure_attention

    return measure_attention(args.preset, batch, args.dtype, args.rounds)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number}; it must be 1 or more")
    return number


def _measure_config(argv: Sequence[str]) -> None:
    """Flags of what is measured with the config of a run, or with a trained model."""
    parser = program_parser(
        "bench",
        __doc__,
        f"{', '.join(OF_PRESETS)} have flags of their own: --help after them shows these.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "what",
        choices=[*OF_CONFIGS, *OF_PRESETS],
        help="memory: of the train step, by model.remat | data: speed, size of a cache | sampling: error of samplers",
    )
    measured = parser.add_mutually_exclusive_group(required=True)
    measured.add_argument("--config", help="FILE.py, FILE.py:key=value,key=value or a run's config.json")
    measured.add_argument("--model", help="sampling: a run, an export or a hub id; scores of the shapes world")
    parser.add_argument("--count", type=int, help="with --model: prompts of each class; default: as evaluate has it")
    add_flags(parser)
    args, rest = parser.parse_known_args(argv)
    overrides = read_overrides(parser, rest)
    if args.what in OF_PRESETS:
        parser.error(f"{args.what} stands before its flags")
    if args.model is not None and (args.what != "sampling" or overrides):
        parser.error("--model is for sampling, without --config")
    if args.count is not None and args.model is None:
        parser.error("--count needs --model")

    def measure() -> None:
        set_up(args.allow_cpu, args.verbose)
        if args.model is None:
            program = importlib.import_module(f"dit_jax.bench.{args.what}")
            getattr(program, OF_CONFIGS[args.what])(args.config, overrides)
        else:
            from dit_jax.bench.sampling import shapes_scores
            from dit_jax.data.shapes_world import QUICK

            shapes_scores(args.model, QUICK if args.count is None else args.count)

    run_program(measure, args.traceback, "lower --config.batch_size, or raise --config.accumulate")


if __name__ == "__main__":
    main(sys.argv[1:])
