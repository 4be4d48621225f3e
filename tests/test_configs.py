"""The shipped configs: their headers say what is predicted of them, and the recipe of eight pictures learns them."""

import dataclasses
import json
import re

import jax
import pytest

from configs import base, large, overfit, small, xl
from dit_jax import build, evaluate, train
from dit_jax.config import load_config
from dit_jax.dry_run import ENCODERS, predict
from dit_jax.models.flops import DEVICES, GIB, training_flops
from dit_jax.resolve import resolve
from dit_jax.sharding import make_mesh
from dit_jax.training.state import abstract_state
from dit_jax.trees import count_parameters

SIZES = {"small": small, "base": base, "large": large, "xl": xl}


@pytest.mark.parametrize("name", SIZES)
def test_the_header_of_a_size_says_what_is_predicted(name):
    config = load_config(f"configs/{name}.py", {})
    resolve(config, 1, *build.describe_encoders(config), 1)
    device = DEVICES["4090"]
    model = build.make_model(config, build.compute_dtype(device.dtype, jax.devices()[0]))
    config.latents.update(shift=(0.0,) * 4, scale=(1.0,) * 4)
    step = build.make_step(config, model, build.make_process(config), *build.make_optimizer(config))
    state = abstract_state(model, step.optimizer, 32, 32, make_mesh(jax.devices()))
    need = predict(config, step, state, 32, 32)
    header = SIZES[name].__doc__
    assert f"configs/{name}.py" in header
    assert f"{count_parameters(state.params) / 1e6:.1f} M parameters" in header
    assert f"{training_flops(model, 32, 32) / 1e9:.1f} GFLOP" in header
    images = config.batch_size // config.accumulate
    assert f"{need.total(images) / GIB:.1f} GiB at batch {config.batch_size}" in header
    budget = int(device.memory * device.usable) - ENCODERS
    assert need.total(images) <= budget
    config.accumulate = 1
    most = re.findall(r"(\d+) with (?:model.remat=)?(none|dots|full)", header)
    assert {remat for _, remat in most} == {"none", "dots", "full"}
    for count, remat in most:
        other = dataclasses.replace(step, model=model.clone(remat=remat))
        assert predict(config, other, state, 32, 32).most_images(budget) == int(count)


def losses(workdir) -> dict[int, float]:
    """Loss by step."""
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows}


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
