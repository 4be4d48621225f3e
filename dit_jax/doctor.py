"""Says what this installation is and has, or what the checkpoints of a run are worth.

    python -m dit_jax.doctor
    python -m dit_jax.doctor --list=runs/quickstart
    python -m dit_jax.doctor --verify=runs/quickstart

Without flags: versions, devices, the NVIDIA driver, the compile cache and the disk. ``--list`` shows every checkpoint
of a run, oldest first, with the loss and the validation error that were written at its step or last before it;
``--verify`` reads and hashes them all, names every file that is not what was written, and ends with exit code 5 if
there is one. Nothing is changed.
"""

import importlib.metadata
import os
import platform
import shutil
import stat
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import dit_jax
from dit_jax.ending import run_program
from dit_jax.errors import CheckpointError
from dit_jax.runtime import compile_cache, git_commit, nvidia_driver, overlooked_gpu, program_parser, quiet_libraries
from dit_jax.stores import files_of, folder_of, reach
from dit_jax.training.saved_steps import CORRUPT, ITEMS, steps_of, verify
from dit_jax.workdir import CHECKPOINTS, METRICS

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy", "transformers")
MIB, GIB = 2**20, 2**30


def main(argv: Sequence[str] | None = None) -> None:
    """The program's flags."""
    parser = program_parser("doctor", __doc__)
    parser.add_argument("--list", metavar="WORKDIR", help="the checkpoints of a run, oldest first")
    parser.add_argument("--verify", metavar="WORKDIR", help="hash them all; exit code 5: one is damaged")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)

    def examine() -> None:
        quiet_libraries()
        if args.list:
            print_checkpoints(folder_of(args.list))
        if args.verify:
            verify_checkpoints(folder_of(args.verify))
        if not args.list and not args.verify:
            for line in describe_installation(Path.cwd()):
                print(line, flush=True)

    run_program(examine, args.traceback, "it needs next to none")


# ------------------------------------------------------------------------------------------------------ installation


def describe_installation(folder: Path) -> Iterator[str]:
    """A line for everything that a run depends on; ``folder`` is where it would write."""
    yield f"dit_jax        {dit_jax.__version__} ({git_commit()}) in {Path(dit_jax.__file__).parent}"
    system = f"{platform.platform()}, {os.cpu_count()} cores"
    yield f"Python         {platform.python_version()} ({sys.executable}), {system}"
    yield f"packages       {', '.join(f'{name} {_version(name)}' for name in PACKAGES)}"
    accelerators = sorted(
        {
            f"{found.name} {found.version}"
            for found in importlib.metadata.distributions()
            if (found.name or "").startswith(("jax-cuda", "jax-rocm", "libtpu"))
        }
    )
    yield f"accelerators   {', '.join(accelerators) or 'no plugin of JAX is installed: CPU only'}"
    yield f"devices        {_devices()}"
    yield f"NVIDIA driver  {nvidia_driver() or 'none'}"
    yield f"compile cache  {_describe_cache(compile_cache())}"
    usage = shutil.disk_usage(folder)
    writable = "" if os.access(folder, os.W_OK) else ", where nothing can be written"
    yield f"disk           {usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB are free in {folder}{writable}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "is missing"


def _devices() -> str:
    """What JAX sees, and what to do where it does not see what is there."""
    import jax

    try:
        devices = jax.devices()
        overlooked = overlooked_gpu()
    except RuntimeError as error:  # a plugin that does not fit the driver
        return f"JAX cannot start: {str(error).splitlines()[0]}"
    kinds = Counter(device.device_kind for device in devices)
    seen = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    return f"{seen}; {overlooked}" if overlooked else seen


def _describe_cache(cache: Path) -> str:
    if not cache.is_dir():
        return f"{cache}, not made yet"
    sizes = [file.stat().st_size for file in cache.rglob("*") if file.is_file()]
    mode = stat.S_IMODE(cache.stat().st_mode)
    words = f"{cache}, {len(sizes):,} files, {sum(sizes) / MIB:.1f} MiB, mode {mode:04o}"
    return f"{words}: what is in it is run as code, so close it to others with chmod 700" if mode & 0o022 else words


# ------------------------------------------------------------------------------------------------------- checkpoints


def print_checkpoints(workdir: Path) -> None:
    """A row for every checkpoint of a run, oldest first.

    Raises:
      CheckpointError: there is none.
    """
    from dit_jax.training.validation import NAME
    from dit_jax.training.writer import figures

    directory, steps = _steps(workdir)
    print(f"{'step':>10}  {'MiB':>8}  {'loss':>8}  {'validation':>10}  files")
    losses, errors = (figures(workdir / METRICS, name) for name in ("loss", NAME))
    validated = [step for step in steps if step in errors]
    for step in steps:
        report = verify(directory, step, "fast", ITEMS)
        files = report.problems[0] if report.problems else "all there" if report.verifiable else "not verifiable"
        if validated and step == min(validated, key=lambda step: errors[step]):
            files += ", the best by validation"
        loss, validation = (_last(found, step) for found in (losses, errors))
        print(f"{step:>10}  {_mib(directory / str(step)):>8.1f}  {loss:>8}  {validation:>10}  {files}")
    for path in sorted(directory.glob(f"*{CORRUPT}")):
        print(f"{path.name:>10}  {_mib(path):>8.1f}  {'':>8}  {'':>10}  damaged and set aside; nothing reads it")
    print(f"compared were sizes; --verify={workdir} hashes every file")


def verify_checkpoints(workdir: Path) -> None:
    """Hash all checkpoints of a run, and name every file that is not what was written.

    Raises:
      CheckpointError: there is none, or one is damaged.
    """
    directory, steps = _steps(workdir)
    damaged = []
    for step in steps:
        report = verify(directory, step, "full", ITEMS)
        if report.problems:
            damaged.append(step)
            for problem in report.problems:
                print(f"step {step}: {problem}", flush=True)
        else:
            print(report, flush=True)
    if damaged:
        raise CheckpointError(
            f"{len(damaged)} of {len(steps)} checkpoints in {directory} are damaged: {', '.join(map(str, damaged))};"
            " training goes on from the newest that is not, and sets newer ones aside"
        )


def _steps(workdir: Path) -> tuple[Path, list[int]]:
    reach(workdir)
    directory = workdir / CHECKPOINTS
    steps = steps_of(directory)
    if not steps:
        raise CheckpointError(f"no checkpoint in {directory}: name the folder of a run")
    return directory, steps


def _mib(folder: Path) -> float:
    return sum(files_of(folder).values()) / MIB


def _last(found: dict[int, float], step: int) -> str:
    """The figure of a step, or of the last before it; a dash where there is none."""
    before = [at for at in found if at <= step]
    return f"{found[max(before)]:.4f}" if before else "-"


if __name__ == "__main__":
    main(sys.argv[1:])
