"""Scores a trained model.

    python -m dit_jax.evaluate --model=runs/quickstart --metric=shapes [--full]

``shapes``: one picture for each of the first 200 (``--full``: 1,000) prompts of every class of the shapes world, from
seeds that training cannot have, without any selection. A program without a network reads each picture back; it is
right when the number of objects, every colour, shape and size, and the relation are those of the prompt.

Writes ``evaluation/shapes.json`` and ``evaluation/grid.png`` into the run and prints, last, the share that is right.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dit_jax.errors import ConfigError
from dit_jax.runtime import add_flags, run_program, set_up
from dit_jax.sample import Pipeline, make_grid, save_png

QUICK, FULL = 200, 1000  # prompts of each class
SHOWN = 16  # pictures of each class in the grid: the first ones
METRICS = ("shapes",)


def score_shapes(pipeline: Pipeline, count: int) -> tuple[dict[str, dict[str, float]], Image.Image]:
    """Draw and check the first ``count`` prompts of every class.

    Returns:
      For every class the number of prompts and the share for which each part of the verdict, and all of it
      (``right``), holds; and a grid of the first pictures of each class, one class after the other.

    Raises:
      ConfigError: the model draws pictures of another size than the checker reads.
    """
    from dit_jax.data.shapes_world import EVALUATION_CLASSES, IMAGE_SIZE, evaluation_scenes
    from dit_jax.metrics.shapes_checker import check

    if pipeline.config.data.image_size != IMAGE_SIZE:
        raise ConfigError(
            f"the model draws {pipeline.config.data.image_size} px; the shapes checker reads {IMAGE_SIZE} px"
        )
    scores, shown = {}, []
    for name in EVALUATION_CLASSES:
        begin = time.monotonic()
        scenes = evaluation_scenes(name, count)
        pictures = pipeline.draw([scene.caption for scene in scenes], range(count))
        verdicts = [check(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
        parts = {part: float(np.mean([getattr(v, part) for v in verdicts])) for part in (*verdicts[0]._fields, "right")}
        scores[name] = {"prompts": count, **parts}
        shown += [Image.fromarray(picture) for picture in pictures[:SHOWN]]
        line = " ".join(f"{part}={share:.3f}" for part, share in parts.items())
        print(f"{name}: {count} prompts in {time.monotonic() - begin:.0f} s: {line}", file=sys.stderr, flush=True)
    return scores, make_grid(shown, columns=8)


def main(argv: Sequence[str] | None = None) -> None:
    """The program's flags."""
    parser = argparse.ArgumentParser(prog="python -m dit_jax.evaluate", description="Score a trained model.")
    parser.add_argument("--model", "--workdir", type=Path, required=True, help="folder of a run")
    parser.add_argument("--metric", choices=METRICS, default="shapes")
    parser.add_argument("--full", action="store_true", help=f"{FULL} prompts of each class instead of {QUICK}")
    parser.add_argument("--ema", choices=("ema", "raw"), default="ema", help="averaged or last parameters")
    parser.add_argument("--step", type=int, help="which checkpoint; default: the newest")
    add_flags(parser)
    args = parser.parse_args(argv)
    run_program(lambda: _evaluate(args), args.traceback)


def _evaluate(args: argparse.Namespace) -> None:
    set_up(args.allow_cpu, args.verbose)
    pipeline = Pipeline.load(args.model, args.ema, args.step)
    scores, grid = score_shapes(pipeline, FULL if args.full else QUICK)
    folder = args.model / "evaluation"
    folder.mkdir(exist_ok=True)
    settings = pipeline.config.sample.to_dict() | {"step": pipeline.step, "parameters": args.ema}
    settings.pop("prompts")
    (folder / "shapes.json").write_text(json.dumps({"settings": settings, "scores": scores}, indent=2) + "\n")
    save_png(grid, folder / "grid.png", {"step": str(pipeline.step)})
    print(f"settings: {' '.join(f'{key}={value}' for key, value in settings.items())}")
    for name, parts in scores.items():
        right = round(parts["right"] * parts["prompts"])
        print(f"{name}: {right} of {parts['prompts']} right")
    print(f"the first {SHOWN} pictures of each: {folder / 'grid.png'}")
    print("shapes: " + " ".join(f"{name}={parts['right']:.2f}" for name, parts in scores.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
