"""The shipped configs: their headers say what is predicted of them, the recipe of eight pictures learns them, and
published recipes train and draw."""

import importlib
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base, large, overfit, small, xl
from dit_jax import build, evaluate, train
from dit_jax.config import load_config
from dit_jax.dry_run import ENCODERS, make_plan, predict, predict_with
from dit_jax.models.flops import DEVICES, GIB, training_flops
from dit_jax.resolve import resolve
from dit_jax.sample import Pipeline
from dit_jax.sharding import abstract_mesh
from dit_jax.training.memory import abstract_batch
from dit_jax.training.state import init_params
from dit_jax.trees import count_parameters

SIZES = {"small": small, "base": base, "large": large, "xl": xl}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("small", "xl") else pytest.mark.slow) for name in SIZES]
)
def test_the_header_of_a_size_says_what_is_predicted(name):
    config = load_config(f"configs/{name}.py", {})
    resolve(config, 1, *build.describe_encoders(config), 1)
    device = DEVICES["4090"]
    dtype = build.compute_dtype(device.dtype, jax.devices()[0])
    plan = make_plan(config, dtype, build.describe_encoders(config)[0], abstract_mesh(1, 1))
    model, need = plan.step.model, predict(config, plan)
    header = SIZES[name].__doc__
    assert f"configs/{name}.py" in header
    assert f"{count_parameters(plan.state.params) / 1e6:.1f} M parameters" in header
    assert f"{training_flops(model, 32, 32) / 1e9:.1f} GFLOP" in header
    images = config.batch_size // config.accumulate
    assert f"{need.total(images) / GIB:.1f} GiB at batch {config.batch_size}" in header
    budget = int(device.memory * device.usable) - ENCODERS
    assert need.total(images) <= budget
    config.accumulate = 1
    most = re.findall(r"(\d+) with (?:model.remat=)?(none|dots|full)", header)
    assert {remat for _, remat in most} == {"none", "dots", "full"}
    for count, remat in most:
        assert predict_with(config, plan, remat=remat).largest_batch(budget) == int(count)


def losses(workdir) -> dict[int, float]:
    """Loss by step."""
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows}


@pytest.mark.slow
def test_eight_pictures_are_learnt_as_the_header_says(tmp_path, capsys):
    """The whole recipe, as a user runs it: half a minute of training."""
    config = overfit.get_config()
    config.sample_every = 0
    train.run(config, tmp_path)
    loss = losses(tmp_path)
    assert loss[1] > 1.5 and loss[200] < 0.1
    assert max(loss[step] for step in loss if step > 900) < 0.05
    capsys.readouterr()
    evaluate.main([f"--model={tmp_path}", "--metric=nearest"])
    assert capsys.readouterr().out.splitlines()[-1] == "nearest: hits=1.00"


RECIPES = sorted(path.stem for path in Path("configs/recipes").glob("*.py") if path.stem != "__init__")
UNLIKE = ("edm", "mmdit")  # of all that they have, the others have something from each


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in UNLIKE else pytest.mark.slow) for name in RECIPES]
)
def test_a_recipe_trains_and_draws(tmp_path, name):
    """Two steps as a user runs it, with less data and a smaller model."""
    few = {"total_steps": "2", "batch_size": "4", "warmup_steps": "1", "data.num_pictures": "12",
           "data.validation_fraction": "0.3", "model.num_layers": "1", "model.hidden_size": "16",
           "model.num_heads": "2", "model.attention_head_dim": "8", "sample.steps": "3"}  # fmt: skip
    config = load_config(f"configs/recipes/{name}.py", few)
    train.run(config, tmp_path)
    rows = list(map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()))
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert all(math.isfinite(row["validation_x0_error"]) for row in rows if "loss" not in row)
    (picture,) = Pipeline.load(tmp_path)(["a red circle"])
    assert picture.size == (64, 64) and np.asarray(picture).std() > 0


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_the_other_sizes_and_its_header_names_it(name):
    module = importlib.import_module(f"configs.recipes.{name}")
    assert f"--config=configs/recipes/{name}.py" in module.__doc__
    config = module.recipe(small.get_config())
    config.model.num_layers = 2
    resolve(config, 1, *build.describe_encoders(config), 1)
    model, process = build.make_model(config, jnp.bfloat16), build.make_process(config)
    build.make_sampler(config, process, build.make_grid(config, process))
    shapes = jax.eval_shape(lambda key: init_params(model, key, 32, 32), jax.random.key(0))
    assert set(shapes) >= {"blocks_0", "blocks_1", "final_layer", "t_embedder", "x_embedder", "y_embedder"}
    plan = make_plan(config, jnp.bfloat16, build.describe_encoders(config)[0], abstract_mesh(1, 1))
    _, metrics = jax.eval_shape(plan.step, plan.state, abstract_batch(model, 4, 32, 32, jnp.float32))
    assert metrics["loss"].shape == ()
