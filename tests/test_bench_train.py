"""Speed of the train step: what is compared is equal, what is printed follows from what was timed, little is needed."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.bench import ablation, presets, train
from dit_jax.bench.__main__ import PRESETS, main
from dit_jax.bench.rounds import interleave, ratio
from dit_jax.errors import ConfigError
from dit_jax.models import blocks, embeddings, layers
from dit_jax.models.flops import training_flops
from dit_jax.sharding import make_mesh
from tests.toy import Toy

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "attention_head_dim": 8, "modulation": "adaln_zero"}
# what `bench train` does without: the packages of programs that read pictures, encoders and checkpoints
UNNEEDED = ["orbax", "transformers", "PIL", "grain", "scipy", "safetensors", "tqdm", "huggingface_hub", "tensorboard",
            "tokenizers", "diffusers"]  # fmt: skip


@pytest.fixture
def tiny(monkeypatch) -> None:
    """``small`` is tiny, on latents of 4 x 4, and the peak of a CPU quickly measured."""
    monkeypatch.setitem(presets.PRESETS, "small", presets.Preset(TINY, 4))
    monkeypatch.setattr(presets, "SIDE", 4)
    monkeypatch.setattr(train, "SIDE", 4)
    monkeypatch.setattr(presets, "TEXT", {"text_length": 5, "text_width": 7, "pooled_width": 6})
    monkeypatch.setattr(train, "ROOF", ((8, 8, 8),))
    monkeypatch.setattr(train, "DROPOUT", (0.0,))


@pytest.mark.usefixtures("tiny")
def test_bench_train_compares_equal_steps_and_its_figures_follow_from_its_seconds(capsys, monkeypatch, tmp_path):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "compile", lambda model: model)  # takes a minute
    main(["train", "--preset=small", "--ref=torch", "--rounds=3", f"--json={tmp_path / 'said.json'}"])
    said = capsys.readouterr().out
    assert re.search(r"^ratio to torch eager: \d+\.\d\d ", said, re.MULTILINE)
    data = {}
    for part in json.loads((tmp_path / "said.json").read_text()):
        data |= part
    assert max(data["agreement"].values()) < 1e-4
    seconds = {name: np.median(data[name]["seconds"]) for name in ("dit_jax", "torch eager", "torch compile")}
    assert all(len(data[name]["seconds"]) == 3 for name in seconds)
    assert data["dit_jax"]["images_per_second"] == pytest.approx(4 / seconds["dit_jax"])
    flops = training_flops(presets.make_bench("small", 4, "float32", 0.0).model, 4, 4)
    mfu = 4 / seconds["dit_jax"] * flops / (len(jax.devices()) * data["peak"])
    assert data["dit_jax"]["mfu"] == pytest.approx(mfu)
    bytes_ = data["bytes"]
    assert bytes_["total"] > bytes_["arguments"] > 3 * 4 * data["parameters"]  # of AdamW and the average


@pytest.mark.usefixtures("tiny")
def test_what_torch_computes_is_compared_first(monkeypatch):
    pytest.importorskip("torch")
    from dit_jax.bench import agreement, reference

    bench = presets.make_bench("small", 4, "float32", 0.0)
    params = bench.state(make_mesh(jax.devices())).params
    other = jax.tree.map(lambda leaf: leaf * 1.01, params)
    true = reference.output_and_gradient_norm
    monkeypatch.setattr(reference, "output_and_gradient_norm", lambda b, p, *rest: true(b, other, *rest))
    with pytest.raises(AssertionError, match="torch computes something else"):
        agreement.agree(bench, params)


def test_the_reference_takes_a_step_that_learns(tiny):
    pytest.importorskip("torch")
    from dit_jax.bench import reference

    bench = presets.make_bench("small", 4, "float32", 0.1)
    models = []
    make = reference.make_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "make_model", lambda *args: models.append(make(*args)) or models[-1])
        step = reference.make_step(bench, bench.state(make_mesh(jax.devices())).params, compiled=False)
    before = {name: p.detach().clone() for name, p in models[0].named_parameters()}
    step()
    moved = [name for name, p in models[0].named_parameters() if not p.equal(before[name])]
    assert set(before) - set(moved) <= {"y_embedder.null_pooled"}  # only if a caption was dropped


def test_presets_are_measured_from_any_folder_but_not_without_the_configs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert presets.make_bench("small", 2, "float32", 0.0).config.batch_size == 2
    monkeypatch.setattr(presets, "default_file", lambda: None)
    with pytest.raises(ConfigError, match="in a clone of the repository"):
        presets.make_bench("small", 2, "float32", 0.0)


def test_every_preset_can_be_named():
    assert tuple(presets.PRESETS) == PRESETS


@pytest.mark.parametrize(("preset", "giga"), [("s2", 6.06), ("b2", 23.01), ("l2", 80.70), ("xl2", 118.62)])
def test_presets_have_the_published_cost(preset, giga):
    model = presets.make_bench(preset, 1, "float32", 0.0).model
    assert training_flops(model, 32, 32) / 6e9 == pytest.approx(giga, abs=0.02)


def test_candidates_take_turns():
    order = []
    seconds = interleave({name: lambda name=name: order.append(name) for name in "abc"}, rounds=3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert all(len(taken) == 3 and (taken >= 0).all() for taken in seconds.values())


def test_a_ratio_is_taken_within_rounds():
    """The second round was twice as slow for both."""
    found = ratio(np.array([3.0, 6.0, 3.3]), np.array([1.0, 2.0, 1.0]))
    assert found.median == 3 and str(found) == "3.00 (3.00 to 3.15)"


def test_bench_train_needs_neither_pictures_nor_encoders_nor_checkpoints():
    program = f"""
import sys
sys.modules.update(dict.fromkeys({UNNEEDED}))  # None: importing it is an ImportError
from dit_jax.bench import __main__, ablation, attention, compiling, sample, train
from dit_jax.runtime import set_up
set_up(allow_cpu=True, verbose=False)
bench = train.make_bench("small", 2, "float32", 0.0)
sample.build.make_sampler(bench.config, bench.step.process, sample.build.make_grid(bench.config, bench.step.process))
import jax
jax.eval_shape(bench.step, jax.eval_shape(lambda: bench.state(train.make_mesh(jax.devices()))), bench.batch)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def gradient_of_toy() -> list[np.ndarray]:
    """As the functions are now."""
    toy = Toy(text_mode="pooled", num_layers=1)

    def loss(params):
        out = toy.model.apply({"params": params}, toy.x, toy.t, toy.text, train=False)
        return jnp.square(out).mean()

    return jax.tree.leaves(jax.device_get(jax.jit(jax.grad(loss))(toy.params)))


@pytest.fixture(scope="module")
def gradient() -> list[np.ndarray]:
    return gradient_of_toy()


@pytest.mark.parametrize(
    ("where", "name", "function"),
    [
        (layers, "layer_norm", ablation.plain_layer_norm),
        (blocks, "attend", ablation.library_attention),
        (embeddings, "project", ablation.project_tokens),
        (embeddings, "project", ablation.project_apart),
    ],
)
def test_what_takes_the_place_of_a_function_has_its_gradient(gradient, where, name, function, monkeypatch):
    """By every parameter."""
    traced = []
    monkeypatch.setattr(where, name, lambda *a, **k: traced.append(1) or function(*a, **k))
    for expected, found in zip(gradient, gradient_of_toy(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert traced


@pytest.fixture
def make_tiny(tiny) -> ablation.MakeBench:
    return functools.partial(presets.make_bench, "small", 4, "float32", 0.0)


@pytest.mark.usefixtures("tiny")
def test_a_choice_changes_how_and_not_what_is_computed(make_tiny):
    """And changes something: what takes the place of a function that is no longer called is found."""
    ours = ablation.ours(make_tiny)
    expected, text = [jax.device_get(ours.run()) for _ in range(3)], ours.program.as_text()
    for choice, (_, otherwise) in ablation.CHOICES.items():
        other = otherwise(make_tiny)
        for step, found in zip(expected, [other.run() for _ in range(3)], strict=True):
            for name in ("loss", "grad_norm"):
                np.testing.assert_allclose(found[name], step[name], rtol=1e-3, err_msg=f"{choice}: {name}")
        assert other.program.as_text() != text and other.bytes > 0, choice


@pytest.mark.usefixtures("tiny")
def test_the_ablation_is_a_table_of_all_choices(capsys, monkeypatch):
    one = dict([*ablation.CHOICES.items()][:1])
    monkeypatch.setattr(ablation, "CHOICES", one)
    main(["ablation", "--preset=small", "--rounds=2"])
    (choice,) = one
    row = rf"^\| {re.escape(choice)} \| JAX's \| \d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\) \| \d\.\d\d \|$"
    assert re.search(row, capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_of_layer_norm_is_that_of_its_formula(dtype):
    x = (3 * jax.random.normal(jax.random.key(0), (2, 5, 16)) + 1).astype(dtype)
    g = jax.random.normal(jax.random.key(1), x.shape).astype(dtype)
    for own, derived in zip(
        jax.vjp(lambda x: layers.layer_norm(x, dtype), x)[1](g),
        jax.vjp(lambda x: ablation.plain_layer_norm(x, dtype), x)[1](g),
        strict=True,
    ):
        assert own.dtype == derived.dtype == dtype
        np.testing.assert_allclose(own.astype(jnp.float32), derived.astype(jnp.float32), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["train"], "the following arguments are required: --preset"),
        (["train", "--preset=huge"], "invalid choice: 'huge'"),
        (["train", "--preset=small", "--batch=0"], "0; it must be 1 or more"),
        (["train", "--preset=small", "--dtype=float8"], "invalid choice: 'float8'"),
        (["train", "--preset=small", "--ref=numpy"], "invalid choice: 'numpy'"),
        (["compile", "--preset=small", "--ref=torch"], "unrecognized arguments: --ref=torch"),
        (["--config=configs/small.py", "train"], "train stands before its flags"),
    ],
)
def test_wrong_flags_end_in_one_line(flags, says, capsys):
    with pytest.raises(SystemExit) as exit:
        main(flags)
    assert exit.value.code == 2 and says in capsys.readouterr().err
