"""Draws pictures from prompts.

    python -m dit_jax.sample --model=runs/quickstart --prompt="a small red circle" --num_images=4 --output=pictures
    python -m dit_jax.sample --model=runs/quickstart --prompts_file=prompts.txt --sampler=heun --steps=20
    python -m dit_jax.sample --model=runs/quickstart --prompt="a blue square" --init_image=circle.png --strength=0.6

Pictures are drawn and written batch by batch; the same command goes on where it was stopped. `Pipeline`, which a
notebook uses, is here by a stable name.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dit_jax.drawing.pictures import BATCH, Archive, Folder, cut_into_batches, make_grid
from dit_jax.drawing.pipeline import Pipeline, check_seeds, spread_seeds
from dit_jax.ending import run_program, writable
from dit_jax.errors import ConfigError
from dit_jax.files import parse_json
from dit_jax.runtime import add_flags, path_of, program_parser, set_up

__all__ = ["Pipeline", "add_model_flags", "add_settings_flags", "main", "make_grid", "read_prompts", "settings_of"]


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `Pipeline.load`, for every program that begins with a trained model."""
    model = parser.add_argument_group("the trained model")
    model.add_argument(
        "--model",
        "--workdir",
        required=True,
        help="folder of a run or an export, gs://bucket/run, or an export's hub id",
    )
    model.add_argument("--ema", choices=("ema", "raw"), help="averaged (default) or last parameters")
    model.add_argument("--step", type=int, help="which checkpoint; default: the newest")


def add_settings_flags(parser: argparse._ActionsContainer) -> None:
    """How pictures are drawn: the keys of ``sample`` that `settings_of` reads."""
    parser.add_argument("--steps", type=int, help="default: the run's")
    parser.add_argument("--guidance_scale", type=float, help="1 is off; default: the run's")
    parser.add_argument(
        "--guidance_interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guide at times from LOW to HIGH, 0 is the picture and 1 noise; default: the run's",
    )
    parser.add_argument("--guidance_rescale", type=float, help="0 is off .. 1; default: the run's")
    parser.add_argument("--apg_parallel", type=float, help="1 is off .. 0; default: the run's")
    parser.add_argument("--apg_norm", type=float, help="0 is off; default: the run's")
    parser.add_argument("--sampler", help="ddpm | ddim | dpmpp_2m | euler | euler_ancestral | heun; default: the run's")
    parser.add_argument("--eta", type=float, help="of ddim: 0 is deterministic .. 1; default: the run's")
    parser.add_argument("--grid", help="times of the steps: uniform | trailing | karras | shifted; default: the run's")
    parser.add_argument("--grid_shift", type=float, help="of shifted: above 1 nearer the noise; default: the run's")
    parser.add_argument("--grid_rho", type=float, help="of karras: larger is nearer the picture; default: the run's")


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The keys of ``sample`` that were given, and None for the others."""
    interval = args.guidance_interval and tuple(args.guidance_interval)
    keys = ("steps", "sampler", "eta", "grid", "grid_shift", "grid_rho")
    of_guidance = ("guidance_scale", "guidance_rescale", "apg_parallel", "apg_norm")
    return {key: getattr(args, key) for key in keys + of_guidance} | {"guidance_interval": interval}


def main(argv: Sequence[str] | None = None) -> None:
    """The program's flags."""
    parser = program_parser("sample", __doc__)
    add_model_flags(parser)
    pictures = parser.add_argument_group("which pictures")
    pictures.add_argument("--prompt", action="append", default=[], help="may be given more than once")
    pictures.add_argument("--prompts_file", type=path_of, help="one prompt a line; .jsonl: rows of prompt and seed")
    pictures.add_argument("--negative_prompt", help="default: the learned null caption")
    pictures.add_argument("--long_prompt", choices=("truncate", "error", "chunk"), default="truncate")
    pictures.add_argument("--num_images", type=int, default=1, help="per prompt")
    pictures.add_argument(
        "--seed", type=int, nargs="+", default=[0], help="one: picture i has seed + i; or one for every picture"
    )
    pictures.add_argument("--height", type=int, help="pixels; default: the run's")
    pictures.add_argument("--width", type=int, help="pixels; default: the run's")
    pictures.add_argument("--output", type=path_of, default=Path("pictures"), help="folder of PNG files, or x.npz")
    add_settings_flags(parser.add_argument_group("how they are drawn"))
    begin = parser.add_argument_group("from a picture that is there")
    begin.add_argument("--init_image", type=path_of, help="a picture to start from")
    begin.add_argument(
        "--strength", type=float, help="0 keeps it .. 1 starts from noise; default: the run's, and 1 with --mask"
    )
    begin.add_argument("--mask", type=path_of, help="of --init_image: white is drawn anew, black is kept")
    add_flags(parser)
    args = parser.parse_args(argv)
    run_program(
        lambda: _draw(args),
        args.traceback,
        "lower --num_images (of up to 64 that are drawn at a time), or --height and --width",
    )


class Wish(NamedTuple):
    """A prompt, and the seed of its first picture where that is its own."""

    prompt: str
    seed: int | None


def read_prompts(path: Path) -> list[Wish]:
    """The prompts of a text file, one a line, or of a ``.jsonl``; empty lines do not count.

    Raises:
      ConfigError: there is no such file, it is not UTF-8, or a row of it is wrong.
    """
    if not path.is_file():
        raise ConfigError(f"no prompts file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompts file {path} is not UTF-8: {error}") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix != ".jsonl":
        return [Wish(line, None) for _, line in lines]
    return [_read_row(line, f"line {number} of {path}") for number, line in lines]


def _read_row(line: str, place: str) -> Wish:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ConfigError(f"{place} is not JSON: {error}") from error
    wish = Wish(row.pop("prompt", None), row.pop("seed", None)) if isinstance(row, dict) else Wish("", None)
    seeded = wish.seed is None or type(wish.seed) is int
    if row or not isinstance(wish.prompt, str) or not seeded:
        raise ConfigError(f'{place} must be {{"prompt": TEXT}} or {{"prompt": TEXT, "seed": NUMBER}}, not {line}')
    return wish


def _wishes(args: argparse.Namespace) -> tuple[list[str], list[int]]:
    """Prompt and seed of every picture."""
    wishes = [Wish(prompt, None) for prompt in args.prompt]
    if args.prompts_file:
        wishes += read_prompts(args.prompts_file)
    if not wishes:
        raise ConfigError("nothing to draw: give --prompt or --prompts_file")
    if args.num_images < 1:
        raise ConfigError(f"--num_images is {args.num_images}; it must be 1 or more")
    if len(args.seed) > 1 and any(wish.seed is not None for wish in wishes):
        raise ConfigError(f"{len(args.seed)} seeds, and others in {args.prompts_file}; give one --seed at most")
    prompts = [wish.prompt for wish in wishes for _ in range(args.num_images)]
    own = [None if wish.seed is None else wish.seed + j for wish in wishes for j in range(args.num_images)]
    spread = spread_seeds(args.seed, len(prompts))
    seeds = [s if mine is None else mine for s, mine in zip(spread, own, strict=True)]
    check_seeds(seeds)
    return prompts, seeds


def _request(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `Pipeline.draw` beside prompts and seeds."""
    for flag, path in (("init_image", args.init_image), ("mask", args.mask)):
        if path is not None and path.resolve().parent == args.output.resolve():
            raise ConfigError(f"--{flag}={path} lies in --output and could be replaced; choose another --output")
    flags = ("negative_prompt", "height", "width", "long_prompt", "init_image", "mask", "strength")
    return {flag: getattr(args, flag) for flag in flags} | settings_of(args)


def _draw(args: argparse.Namespace) -> None:
    prompts, seeds = _wishes(args)
    request = _request(args)
    set_up(args.allow_cpu, args.verbose)
    from dit_jax.build import config_errors
    from dit_jax.training.progress import Counter  # after set_up, which decides how jax begins

    pipeline = Pipeline.load(args.model, args.ema, args.step)
    settings = pipeline.identity(**request)
    if args.long_prompt == "error":
        with config_errors("prompt"):  # all of them, before hours of work
            pipeline.text_encoder.tokenize(prompts, args.long_prompt)
    batches = cut_into_batches(prompts, seeds, settings)
    step = pipeline.trained.step
    output: Archive | Folder
    with writable(args.output):
        if args.output.suffix == ".npz":
            output = Archive(args.output, batches, settings)
        else:
            columns = args.num_images if args.num_images > 1 else min(len(prompts), 8)
            output = Folder(args.output, batches, step, columns)
    print(f"{args.model}: step {step}, {pipeline.trained.parameters} parameters", flush=True)
    missing = [batch for batch in batches if not output.has(batch)]
    left = sum(len(batch.prompts) for batch in missing)
    if left < len(prompts):
        print(f"{args.output}: {len(prompts) - left} of {len(prompts)} pictures are there already", flush=True)
    counter = Counter("drew", "pictures", left, every=0.0)
    for batch in missing:
        pixels = pipeline.draw(batch.prompts, batch.seeds, **request)
        with writable(args.output):
            output.write(batch, pixels)
        counter.add(len(batch.prompts))
    counter.close()
    if isinstance(output, Folder) and len(prompts) <= BATCH:
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            print(f"{output.path(i)}  seed={seed}  {prompt}")
    with writable(args.output):
        line = output.close()
    print(line)


if __name__ == "__main__":
    main(sys.argv[1:])
