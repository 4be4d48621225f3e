"""Draws pictures from prompts.

    python -m dit_jax.sample --model=runs/quickstart --prompt="a small red circle" --num_images=4 --output=pictures

`Pipeline`, which a notebook uses, is here by a stable name.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dit_jax.errors import ConfigError
from dit_jax.pictures import make_grid, save_png
from dit_jax.pipeline import Pipeline
from dit_jax.runtime import add_flags, path_of, run_program, set_up, writable

__all__ = ["Pipeline", "add_model_flags", "main", "make_grid", "read_prompts"]


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `Pipeline.load`, for every program that begins with a trained model."""
    parser.add_argument(
        "--model", "--workdir", required=True, help="folder of a run or an export, or an export's hub id"
    )
    parser.add_argument("--ema", choices=("ema", "raw"), help="averaged (default) or last parameters")
    parser.add_argument("--step", type=int, help="which checkpoint; default: the newest")


def main(argv: Sequence[str] | None = None) -> None:
    """The program's flags."""
    parser = argparse.ArgumentParser(prog="python -m dit_jax.sample", description=__doc__.split("\n")[0])
    add_model_flags(parser)
    parser.add_argument("--prompt", action="append", default=[], help="may be given more than once")
    parser.add_argument("--prompts_file", type=path_of, help="one prompt a line")
    parser.add_argument("--num_images", type=int, default=1, help="per prompt")
    parser.add_argument("--seed", type=int, default=0, help="picture i has seed + i")
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
    parser.add_argument("--negative_prompt", help="default: the learned null caption")
    parser.add_argument("--sampler", help="ddpm | ddim | dpmpp_2m | euler | euler_ancestral | heun; default: the run's")
    parser.add_argument("--grid", help="times of the steps: uniform | trailing | karras | shifted; default: the run's")
    parser.add_argument("--height", type=int, help="pixels; default: the run's")
    parser.add_argument("--width", type=int)
    parser.add_argument("--long_prompt", choices=("truncate", "error"), default="truncate")
    parser.add_argument("--output", type=path_of, default=Path("pictures"), help="folder for the PNG files")
    add_flags(parser)
    args = parser.parse_args(argv)
    run_program(lambda: _draw(args), args.traceback, "draw fewer pictures at a time, or smaller ones")


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
      ConfigError: there is no such file, or it is not UTF-8.
    """
    if not path.is_file():
        raise ConfigError(f"no prompts file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompts file {path} is not UTF-8: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _draw(args: argparse.Namespace) -> None:
    prompts = list(args.prompt)
    if args.prompts_file:
        prompts += read_prompts(args.prompts_file)
    if not prompts:
        raise ConfigError("nothing to draw: give --prompt or --prompts_file")
    if args.num_images < 1:
        raise ConfigError(f"--num_images is {args.num_images}; it must be 1 or more")
    set_up(args.allow_cpu, args.verbose)
    pipeline = Pipeline.load(args.model, args.ema, args.step)
    with writable(args.output):
        args.output.mkdir(parents=True, exist_ok=True)
    print(f"{args.model}: step {pipeline.trained.step}, {pipeline.trained.parameters} parameters", flush=True)
    images = pipeline(
        prompts,
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        seed=args.seed,
        num_images=args.num_images,
        negative_prompt=args.negative_prompt,
        sampler=args.sampler,
        height=args.height,
        width=args.width,
        long_prompt=args.long_prompt,
        grid=args.grid,
        guidance_interval=args.guidance_interval and tuple(args.guidance_interval),
        guidance_rescale=args.guidance_rescale,
        apg_parallel=args.apg_parallel,
        apg_norm=args.apg_norm,
    )
    for i, image in enumerate(images):
        path = args.output / f"{i:05d}.png"
        with writable(args.output):
            save_png(image, path, {key: image.info[key] for key in ("prompt", "seed", "step")})
        print(f"{path}  seed={image.info['seed']}  {image.info['prompt']}")
    columns = args.num_images if args.num_images > 1 else min(len(images), 8)
    with writable(args.output):
        make_grid(images, columns).save(args.output / "grid.png")
    print(f"{args.output / 'grid.png'}  {len(images)} pictures")


if __name__ == "__main__":
    main(sys.argv[1:])
