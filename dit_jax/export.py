"""Takes a trained model out of its run, into one folder that has all that is needed to draw with it.

    python -m dit_jax.export --model=runs/quickstart --dtype=bfloat16 --output=exports/quickstart
    python -m dit_jax.sample --model=exports/quickstart --prompt="a small red circle"

    python -m dit_jax.export --model=runs/quickstart --format=diffusers --output=exports/for_torch
    python exports/for_torch/sample.py --prompt="a small red circle"                           # torch and diffusers

Optimizer, logs and the other set of parameters stay behind; a README says what the model is and came from. Encoders
that come from the hub are named, with their hashes; those from elsewhere, the embedded ones among them, are copied in,
so that the folder can be moved anywhere. For diffusers all are copied.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dit_jax import stores
from dit_jax.config import FORMATS
from dit_jax.drawing.pipeline import Pipeline
from dit_jax.ending import run_program, writable
from dit_jax.errors import ConfigError
from dit_jax.runtime import add_flags, path_of, program_parser, set_up
from dit_jax.sample import add_model_flags, add_settings_flags, settings_of

DTYPES = ("float32", "bfloat16")


def export(
    pipeline: Pipeline, output: Path, form: str, dtype: str, copy_encoders: bool, run: Path | None = None
) -> None:
    """Write a model as a folder of its own, which appears whole or not at all.

    Args:
      pipeline: the model; the settings in its config are what the export draws with.
      output: the folder; must not be there yet, or be empty.
      form: ``safetensors``, ``orbax``, which restores on any number and kind of devices, or ``diffusers``.
      dtype: ``float32`` or ``bfloat16``, of the parameters on disk.
      copy_encoders: copy the encoders that come from the hub too.
      run: the folder that the model lies in, for numbers and pictures of its README; None where it is not here.

    Raises:
      ConfigError: ``output`` holds something, or diffusers has no counterpart of a part of the model.
      WorkdirError: ``output`` cannot be written to.
    """
    from dit_jax.encoders import places
    from dit_jax.exchange import components
    from dit_jax.exchange.card import Facts, write_card
    from dit_jax.stored import write_stored
    from dit_jax.trees import count_parameters

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} holds something already; give another --output, or remove it")
    config, trained, vae, text_encoder = pipeline.config, pipeline.trained, pipeline.vae, pipeline.text_encoder
    scheduler = components.check(config, vae, text_encoder) if form == "diffusers" else None
    growing = output.parent / f".{output.name}.{os.getpid()}"
    try:
        with writable(output):
            growing.mkdir(parents=True)
            write_stored(growing, config, trained, pipeline.params, form, dtype)
            if scheduler:
                components.write(growing, config, vae, text_encoder, scheduler)
            else:
                if copy_encoders or not places.is_hub_id(vae.name):
                    vae.copy_to(growing / "vae")
                if copy_encoders or not places.is_hub_id(text_encoder.name):
                    text_encoder.copy_to(growing / "text_encoder")
            count = count_parameters(pipeline.params)
            write_card(growing, Facts(output.name, form, config, asdict(trained), count, scheduler, run))
            growing.replace(output)
    finally:
        shutil.rmtree(growing, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The program's flags."""
    parser = program_parser("export", __doc__)
    add_model_flags(parser)
    parser.add_argument("--output", type=path_of, help="the folder to make; default: exports/<name of the model>")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="safetensors",
        help="orbax restores on any topology; diffusers: its components, and a script that draws with torch",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the parameters on disk")
    parser.add_argument("--copy_encoders", action="store_true", help="copy encoders that come from the hub too")
    add_settings_flags(parser.add_argument_group("what the export draws with, unless told otherwise"))
    add_flags(parser)
    args = parser.parse_args(argv)
    run_program(lambda: _export(args), args.traceback, "JAX_PLATFORMS=cpu exports it in the host's memory")


def _export(args: argparse.Namespace) -> None:
    set_up(args.allow_cpu, args.verbose)
    pipeline = Pipeline.load(args.model, args.ema, args.step)
    pipeline.identity(**settings_of(args))  # refuses what cannot be drawn
    pipeline.config = pipeline.sample_config(settings_of(args))
    output = args.output or Path("exports") / Path(args.model).resolve().name
    model = stores.folder_of(str(args.model))
    run = model if model.is_dir() and not stores.in_bucket(model) else None
    export(pipeline, output, args.format, args.dtype, args.copy_encoders, run)
    trained = pipeline.trained
    print(f"{args.model}: step {trained.step}, {trained.parameters} parameters in {args.dtype}")
    for path in sorted(output.iterdir()):
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        print(f"{path}  {sum(file.stat().st_size for file in files) / 2**20:.2f} MiB")
    for name in ("vae", "text_encoder"):
        if not (output / name).is_dir():
            print(f"{name} is not in it: {pipeline.config[name]}, sha256 {getattr(trained, name)[:12]}")


if __name__ == "__main__":
    main(sys.argv[1:])
