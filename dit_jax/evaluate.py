"""Scores a trained model.

    python -m dit_jax.evaluate --model=runs/quickstart --metric=shapes --full
    python -m dit_jax.evaluate --model=runs/emoji --metric=nearest
    python -m dit_jax.evaluate --model=runs/mine --metric=validation

``shapes``: one picture for each of the first 200 (``--full``: 1,000) prompts of every class of the shapes world, from
seeds that training cannot have, without any selection. A program without a network reads each picture back; it is
right when the number of objects, every colour, shape and size, and the relation are those of the prompt.

``nearest``: one picture for each of 100 captions, evenly spaced over the training records; the share whose nearest
training picture (`dit_jax.metrics.nearest`) has that caption. It measures what a model has learnt by heart.

``validation``: the error of x0 (`dit_jax.training.validation`) on the records that the run set aside, as the run itself
logs it with ``validate_every``; or on all records of another source. It draws nothing.

All write ``evaluation/METRIC.json``, and a grid of the first pictures that they drew, into the run, show the scores on
its ``report.html``, and print the score last.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dit_jax.data.shapes_world import FULL, QUICK
from dit_jax.drawing.pictures import make_grid, save_png
from dit_jax.drawing.pipeline import Pipeline
from dit_jax.ending import run_program, writable
from dit_jax.errors import CheckpointError, ConfigError
from dit_jax.runtime import add_flags, path_of, program_parser, say, set_up
from dit_jax.sample import add_model_flags
from dit_jax.workdir import METRICS, Workdir

SHOWN_SHAPES = 16  # pictures of each class in the grid: the first ones
CAPTIONS = 100  # training captions of ``nearest``
SHOWN_NEAREST = 64
COLUMNS = 8

Scores = dict[str, Any]


def score_shapes(pipeline: Pipeline, full: bool) -> tuple[Scores, Image.Image, str]:
    """Draw and check the first prompts of every class of the shapes world.

    Returns:
      For every class the number of prompts and the share for which each part of the verdict, and all of it
      (``right``), holds; a grid of the first pictures of each class, one class after the other; the score in a line.

    Raises:
      ConfigError: the model draws pictures of another size than the checker reads.
    """
    from dit_jax.data.shapes_world import EVALUATION_CLASSES, IMAGE_SIZE, evaluation_scenes
    from dit_jax.metrics.shapes_checker import check

    size, count = pipeline.config.data.image_size, FULL if full else QUICK
    if size != IMAGE_SIZE:
        raise ConfigError(f"the model draws {size} px; the shapes checker reads {IMAGE_SIZE} px")
    scores: Scores = {}
    shown = []
    for name in EVALUATION_CLASSES:
        begin = time.monotonic()
        scenes = evaluation_scenes(name, count)
        pictures = pipeline.draw([scene.caption for scene in scenes], range(count))
        verdicts = [check(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
        parts = {part: float(np.mean([getattr(v, part) for v in verdicts])) for part in (*verdicts[0]._fields, "right")}
        scores[name] = {"prompts": count, **parts}
        shown += [Image.fromarray(picture) for picture in pictures[:SHOWN_SHAPES]]
        shares = " ".join(f"{part}={share:.3f}" for part, share in parts.items())
        print(f"{name}: {count} prompts in {time.monotonic() - begin:.0f} s: {shares}", flush=True)
    line = "shapes: " + " ".join(f"{name}={parts['right']:.2f}" for name, parts in scores.items())
    return scores, make_grid(shown, COLUMNS), line


def score_nearest(pipeline: Pipeline) -> tuple[Scores, Image.Image, str]:
    """Draw captions of the training set and look for the nearest training picture of each.

    Returns:
      The number of captions and the share of hits; a grid of the first pictures; the score in a line.

    Raises:
      ConfigError: there are no pictures, only a cache.
      DataError: the training pictures are not where they were.
      CheckpointError: what is there now is not what the model was trained on.
    """
    from dit_jax import build
    from dit_jax.data.cache.gather import Cache
    from dit_jax.data.sources.records import BadRecord
    from dit_jax.data.transforms import cut
    from dit_jax.metrics.nearest import hits, small_pixels

    source = build.make_source(pipeline.config, "train")
    if isinstance(source, Cache):
        raise ConfigError("the model was trained from a cache, which holds no pictures; say where they are: --source")
    check_trained_on(pipeline, source.fingerprint())
    pixels, captions, size = [], [], pipeline.config.data.image_size
    for i in range(len(source)):
        try:
            record = source[i]
        except BadRecord:
            continue
        pixels.append(small_pixels(cut(record.image, size, size, 0.5, 0.5)))
        captions.append(record.captions)
    chosen = np.linspace(0, len(captions) - 1, min(CAPTIONS, len(captions))).astype(int)
    prompts = [captions[i][0] for i in chosen]
    pictures = pipeline.draw(prompts, range(len(prompts)))
    share = float(hits(list(pictures), prompts, np.stack(pixels), captions).mean())
    print(f"{len(prompts)} captions of {len(captions)} training records", flush=True)
    grid = make_grid([Image.fromarray(picture) for picture in pictures[:SHOWN_NEAREST]], COLUMNS)
    return {"prompts": len(prompts), "hits": share}, grid, f"nearest: hits={share:.2f}"


def check_trained_on(pipeline: Pipeline, fingerprint: str) -> None:
    """Raises CheckpointError if the training part of the data is not what the model was trained on."""
    if fingerprint != pipeline.trained.data:
        raise CheckpointError(
            f"the model was trained on other records than data.source={pipeline.config.data.source} holds now"
            f" (hash {pipeline.trained.data[:12]}, here {fingerprint[:12]}); put them back"
        )


def score_validation(pipeline: Pipeline, elsewhere: bool) -> tuple[Scores, None, str]:
    """The error of x0 at every level of noise.

    Args:
      pipeline: the model.
      elsewhere: whether ``data.source`` was named for this, and not by the run. If it holds the records of the run,
        those that were set aside are scored; else all are.

    Returns:
      The number of records and the errors by level; nothing to look at; the mean in a line.

    Raises:
      ConfigError: the run set nothing aside and no other source is named, or a cache made with other encoders.
      DataError: records that cannot be read.
      CheckpointError: the data of the run are not what they were.
    """
    import jax

    from dit_jax import build
    from dit_jax.feed import open_validation
    from dit_jax.sharding import make_mesh, replicated
    from dit_jax.training.validation import as_row, in_words

    config = pipeline.config
    fraction, source = config.data.validation_fraction, config.data.source
    if not fraction and not elsewhere:
        raise ConfigError(
            "the run set no records aside (data.validation_fraction is 0); name other captioned pictures: --source"
        )
    fingerprint = build.make_source(config, "train").fingerprint() if fraction else ""
    if not elsewhere:
        check_trained_on(pipeline, fingerprint)
    own = fingerprint == pipeline.trained.data
    records = build.make_validation_source(config) if own else build.make_source(config, "all")
    print(f"{'set aside by the run' if own else 'all records'}: {len(records):,} of {source}", flush=True)
    encoders = pipeline.vae, pipeline.text_encoder
    encoded = open_validation(config, records, *encoders, say, listed=None, kept=None)
    model = build.make_model(config, build.compute_dtype(config.dtype, jax.devices()[0]))
    mesh = make_mesh(jax.devices())
    validation = build.make_validation(config, model, build.make_process(config), encoded, mesh)
    errors = validation(jax.device_put(pipeline.params, replicated(mesh)))
    scores = {"source": source, "records": len(validation), "set_aside": own, **as_row(errors)}
    return scores, None, f"validation: {in_words(errors)}"


SCORED: dict[str, Callable[[Pipeline, argparse.Namespace], tuple[Scores, Image.Image | None, str]]] = {
    "shapes": lambda pipeline, args: score_shapes(pipeline, args.full),
    "nearest": lambda pipeline, args: score_nearest(pipeline),
    "validation": lambda pipeline, args: score_validation(pipeline, args.source is not None),
}


def main(argv: Sequence[str] | None = None) -> None:
    """The program's flags."""
    parser = program_parser("evaluate", __doc__)
    add_model_flags(parser)
    parser.add_argument("--metric", choices=SCORED, default="shapes")
    parser.add_argument("--full", action="store_true", help=f"shapes: {FULL} prompts of each class, not {QUICK}")
    parser.add_argument(
        "--source",
        help="nearest: where the training pictures are; validation: the same, or other captioned pictures, all of which"
        " are scored; default: where they were",
    )
    add_flags(parser)
    args = parser.parse_args(argv)
    run_program(lambda: _evaluate(args), args.traceback, "JAX_PLATFORMS=cpu scores it in the host's memory")


def _evaluate(args: argparse.Namespace) -> None:
    if args.full and args.metric != "shapes":
        raise ConfigError("--full is for --metric=shapes")
    if args.source is not None and args.metric == "shapes":
        raise ConfigError("--source is for --metric=nearest and --metric=validation")
    set_up(args.allow_cpu, args.verbose)
    pipeline = Pipeline.load(args.model, args.ema, args.step)
    if args.source == pipeline.config.data.source:
        args.source = None  # no other: it must be what it was in training
    if args.source is not None:
        pipeline.config.data.source = args.source
    model = path_of(args.model)
    # beside a model from the hub or a bucket nothing can be written
    folder = model / "evaluation" if model.is_dir() else Path("evaluation") / model.name
    from dit_jax.duties import make_page_again

    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
    trained = pipeline.trained
    settings = pipeline.config.sample.to_dict() if args.metric != "validation" else {}
    settings |= {"step": trained.step, "parameters": trained.parameters}
    for unused in ("prompts", "strength"):
        settings.pop(unused, None)
    print("settings: " + " ".join(f"{key}={value}" for key, value in settings.items()), flush=True)
    scores, grid, line = SCORED[args.metric](pipeline, args)
    written = json.dumps({"settings": settings, "scores": scores}, indent=2)
    with writable(folder):
        (folder / f"{args.metric}.json").write_text(written + "\n")
        if grid:
            save_png(grid, folder / f"{args.metric}.png", {"step": str(trained.step)})
            print(f"pictures, unpicked: {folder / f'{args.metric}.png'}")
    if (model / METRICS).is_file() and (warning := make_page_again(Workdir(model, model))):
        print(f"warning: {warning}")
    print(line)


if __name__ == "__main__":
    main(sys.argv[1:])
