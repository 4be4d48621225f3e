"""What every sampler gives for so many evaluations of the network.

With ``--config``, how far it is from the truth, with a mixture of Gaussians in place of data and its exact denoiser in
place of the network, on the schedule and grid of the config.

With ``--model``, how many pictures of a trained model of the shapes world are right, as `dit_jax.evaluate` counts them;
all but sampler and steps as the model's config has it. Guidance makes two passes of one evaluation.
"""

import time
from collections.abc import Mapping, Sequence

from dit_jax.config import load_config
from dit_jax.errors import ConfigError

EVALUATIONS = (5, 8, 10, 15, 20, 30, 50)
A_STEP = {"heun": 2}  # evaluations; 1 elsewhere. Of an odd number it takes one less
DRAWS = (1024, (4, 4, 1))  # images of a sampler, and the shape of each: every element is a draw of its own
EXACT = 1000  # steps of Heun's method whose end counts as exact


def mixture_errors(spec: str, overrides: dict[str, str]) -> None:
    """Print the errors of all samplers on a mixture of Gaussians, as two Markdown tables."""
    import dataclasses

    import jax
    import numpy as np

    from dit_jax import build
    from dit_jax.diffusion import mixture, samplers

    config = load_config(spec, overrides)
    process = dataclasses.replace(build.make_process(config), prediction="v")  # the denoiser is exact: any would do
    denoise = mixture.make_denoise(process)
    count, shape = DRAWS
    keys = jax.random.split(jax.random.key(config.seed), count)

    def draw(name: str, steps: int) -> np.ndarray:
        config.sample.sampler, config.sample.steps = name, steps
        grid = build.make_grid(config, process)
        sampler = build.make_sampler(config, process, grid)

        def run(keys: jax.Array) -> jax.Array:
            return samplers.run(sampler, keys, samplers.draw_prior(keys, shape), grid, [(0, steps, denoise)])

        return np.asarray(jax.jit(run)(keys), np.float64).ravel()

    exact = draw("heun", EXACT)
    truth = mixture.quantiles((np.arange(exact.size) + 0.5) / exact.size)
    random = np.random.default_rng(0).uniform(size=exact.size)
    floor = np.abs(np.sort(mixture.quantiles(random)) - truth).mean()
    grid = f"schedule {config.diffusion.schedule}, grid {config.sample.grid}"
    found = {
        (name, n): draw(name, n // A_STEP.get(name, 1))
        for name in ("euler", "dpmpp_2m", "heun", "ddpm")
        for n in EVALUATIONS
    }
    print(f"root mean square distance from the exact solution, by evaluations; {grid}")
    distance = {key: f"{np.sqrt(np.mean((x - exact) ** 2)):.4f}" for key, x in found.items()}
    print_table(("euler", "dpmpp_2m", "heun"), distance)
    print(
        f"\nWasserstein distance of {exact.size:,} draws from the mixture, by evaluations; {grid};"
        f" as many true draws have {floor:.4f}"
    )
    distance = {key: f"{np.abs(np.sort(x) - truth).mean():.4f}" for key, x in found.items()}
    print_table(("euler", "dpmpp_2m", "heun", "ddpm"), distance)


def shapes_scores(model: str, count: int) -> None:
    """Print the share of prompts that each sampler gets right, a Markdown table for every class of the shapes world.

    Args:
      model: what `dit_jax.sample.Pipeline` loads.
      count: of prompts of each class, the first ones.

    Raises:
      CheckpointError: there is no such model.
      ConfigError: the count is below 1, or the model draws pictures of another size than the checker reads.
    """
    from dit_jax.data.shapes_world import EVALUATION_CLASSES, IMAGE_SIZE, evaluation_scenes
    from dit_jax.metrics.shapes_checker import check
    from dit_jax.sample import Pipeline

    if count < 1:
        raise ConfigError(f"--count is {count}; it must be 1 or more")
    pipeline = Pipeline.load(model)
    config = pipeline.config
    if config.data.image_size != IMAGE_SIZE:
        raise ConfigError(f"the model draws {config.data.image_size} px; the shapes checker reads {IMAGE_SIZE} px")
    samplers = ["euler", "dpmpp_2m", "heun", "ddpm"]
    if config.model.out_channels > config.model.in_channels:
        samplers.append("euler_ancestral")  # ddpm without the learned variance
    scenes = [scene for name in EVALUATION_CLASSES for scene in evaluation_scenes(name, count)]
    prompts, seeds = [scene.caption for scene in scenes], list(range(count)) * len(EVALUATION_CLASSES)
    found: dict[str, dict[tuple[str, int], str]] = {name: {} for name in EVALUATION_CLASSES}
    print(f"{model}, step {pipeline.trained.step}: {count} prompts of each class", flush=True)
    for sampler in samplers:
        for n in EVALUATIONS:
            begin = time.monotonic()
            pictures = pipeline.draw(prompts, seeds, sampler=sampler, steps=n // A_STEP.get(sampler, 1))
            right = [check(picture, scene).right for picture, scene in zip(pictures, scenes, strict=True)]
            for i, name in enumerate(EVALUATION_CLASSES):
                found[name][sampler, n] = f"{sum(right[i * count : (i + 1) * count]) / count:.3f}"
            said = " ".join(f"{name}={shares[sampler, n]}" for name, shares in found.items())
            print(f"{sampler}, {n} evaluations: {said} in {time.monotonic() - begin:.0f} s", flush=True)
    s = config.sample
    for name, shares in found.items():
        print(
            f"\n{name}: share of {count} prompts drawn right, by evaluations; schedule {config.diffusion.schedule},"
            f" grid {s.grid}, guidance_scale {s.guidance_scale:g} at times {s.guidance_interval}"
        )
        print_table(samplers, shares)
    print("\neuler is ddim with eta=0" + ("" if len(samplers) > 4 else "; euler_ancestral is ddpm"))


def print_table(samplers: Sequence[str], cells: Mapping[tuple[str, int], str]) -> None:
    """A Markdown table of what was found for a sampler and a number of evaluations."""
    print("| sampler | " + " | ".join(map(str, EVALUATIONS)) + " |\n|---|" + "---|" * len(EVALUATIONS))
    for name in samplers:
        print(f"| {name} | " + " | ".join(cells[name, n] for n in EVALUATIONS) + " |", flush=True)
