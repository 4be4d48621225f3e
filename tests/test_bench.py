"""What a model takes: remat keeps less, in the traced step and in the compiled one, and the program says so; and how
quick and how large its data are."""

import re

import jax
import numpy as np
import pytest

from dit_jax import sample
from dit_jax.bench import data, sampling
from dit_jax.bench.__main__ import main
from dit_jax.data.cache.made_up import make_up
from dit_jax.data.shapes_world import EVALUATION_CLASSES, evaluation_scenes, render
from dit_jax.stored import Trained
from dit_jax.training.memory import residual_bytes
from tests.tiny_run import CONFIG, tiny_config

# so that activations are more than parameters and optimizer
SMALL = {"batch_size": 64, "optimizer": "adamw", "model.hidden_size": 64, "model.num_layers": 3, "model.num_heads": 4,
         "model.attention_head_dim": 16, "model.text_mode": "pooled", "model.dropout": 0.1}  # fmt: skip


def rows(capsys, *flags: str) -> dict[str, list[int]]:
    main(["memory", f"--config={CONFIG}", *(f"--config.{k}={v}" for k, v in SMALL.items()), *flags])
    lines = re.findall(r"^\| (\w+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", capsys.readouterr().out, re.MULTILINE)
    return {name: [int(n.replace(",", "")) for n in numbers] for name, *numbers in lines}


@pytest.mark.slow
def test_remat_keeps_less_and_the_compiled_step_takes_less(capsys):
    """On the CPU as well, where the compiler would merge again what is computed twice."""
    found = rows(capsys)
    none, dots, full = found["none"], found["dots"], found["full"]
    assert none[0] > 2.5 * dots[0] > 2.5 * 2 * full[0]
    assert none[1] > 1.5 * dots[1] and dots[1] > full[1]
    assert all(total > temporaries for _, temporaries, total in found.values())


def test_bytes_between_the_passes_are_those_that_the_gradient_needs():
    """sin(a x) keeps a x (or its cosine); the arguments themselves are not counted, nor what is kept twice."""

    def function(a, x):
        return jax.numpy.sin(a * x).sum()

    shape = jax.ShapeDtypeStruct((10, 3), "float32")
    assert residual_bytes(function, shape, shape) == 10 * 3 * 4
    assert residual_bytes(lambda a, x: (a * x).sum(), shape, shape) == 0


def test_an_unknown_flag_ends_in_one_line(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["memory", f"--config={CONFIG}", "--batch=8"])
    assert exit.value.code == 2 and "unrecognized argument --batch" in capsys.readouterr().err


def measure_data(capsys, monkeypatch, *flags: str) -> str:
    for name, value in {"RECORDS": 300, "PER_SHARD": 64, "SECONDS": 0.01, "ROUNDS": 1, "WARM_UP": 1}.items():
        monkeypatch.setattr(data, name, value)
    main(["data", f"--config={CONFIG}", "--config.batch_size=8", *flags])
    return capsys.readouterr().out


def test_bench_data_makes_up_a_cache_and_measures_it_with_one_thread_and_more(capsys, monkeypatch):
    said = measure_data(capsys, monkeypatch)
    tokens = float(re.search(r"300 records, ([\d.]+) tokens a caption", said)[1])
    assert 12 < tokens < 17
    speeds = re.findall(r"^\| (\d) \| ([\d,]+) \| ([\d,]+) \|$", said, re.MULTILINE)
    assert [int(threads) for threads, *_ in speeds] == [1, 2, 4]
    assert all(int(n.replace(",", "")) > 0 for row in speeds for n in row)


def test_bench_data_counts_the_bytes_of_the_cache_that_is_named(capsys, monkeypatch, tmp_path):
    making = {
        "format": 1,
        "image_size": 16,
        "crop": "center",
        "mirrored": False,
        "buckets": [[16, 16]],
        "vae": {"name": "", "sha256": "", "shift": [], "scale": [], "factor": 8, "channels": 4},
        "text_encoder": {"name": "", "sha256": "", "length": 40, "width": 10, "pooled_width": 10},
        "storage_dtype": "float16",
        "records_per_shard": 64,
        "captions_per_shard": 64,
    }
    make_up(tmp_path / "cache", 200, making)
    said = measure_data(capsys, monkeypatch, f"--config.data.source=1*cache:{tmp_path / 'cache'}")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "cache").glob("*.safetensors")}
    text = sum(size for name, size in sizes.items() if name.startswith("texts")) / 200
    rest = sum(sizes.values()) / 200 - text
    padded = 40 * 10
    for what, taken, others in (("text", text, 0), ("all", text + rest, rest)):
        two, four = (f"{others + padded * n:,.0f}: {(others + padded * n) / taken:.1f} x" for n in (2, 4))
        assert f"| {what} | {taken:,.0f} | {two} | {four} |" in said


def test_bench_sampling_ranks_the_samplers_by_their_order(capsys, monkeypatch):
    for name, value in {"EVALUATIONS": (10, 40), "DRAWS": (16, (4, 4, 1)), "EXACT": 100}.items():
        monkeypatch.setattr(sampling, name, value)
    main(["sampling", f"--config={CONFIG}"])
    said = capsys.readouterr().out
    errors = {
        name: [float(a), float(b)]
        for name, a, b in re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \|$", said, re.M)[1:4]
    }
    assert 3 < errors["euler"][0] / errors["euler"][1] < 5  # first order
    assert errors["dpmpp_2m"][0] / errors["dpmpp_2m"][1] > 8 and errors["heun"][0] / errors["heun"][1] > 8  # second
    assert errors["dpmpp_2m"][1] < errors["euler"][1]


class Painter:
    """Stands in for a pipeline: what it draws is right from so many steps on, by sampler."""

    def __init__(self, needs):
        self.needs, self.config, self.trained = needs, tiny_config(), Trained(7, "ema", "", "", "")

    def draw(self, prompts, seeds, sampler, steps):
        scenes = [scene for name in EVALUATION_CLASSES for scene in evaluation_scenes(name, 2)]
        assert prompts == [scene.caption for scene in scenes] and seeds == [0, 1] * 3
        assert sampler in self.needs
        good = 1 if steps >= self.needs[sampler] else 0  # one of two prompts is always missed
        white = np.full((64, 64, 3), 255, np.uint8)
        return np.stack(
            [render(scene) if good and seed == 0 else white for scene, seed in zip(scenes, seeds, strict=True)]
        )


def test_bench_sampling_of_a_model_counts_what_each_sampler_draws_right(capsys, monkeypatch):
    painter = Painter({"euler": 1, "dpmpp_2m": 10, "heun": 4, "ddpm": 41})
    monkeypatch.setattr(sample.Pipeline, "load", lambda model: painter)
    monkeypatch.setattr(sampling, "EVALUATIONS", (5, 8, 40))
    main(["sampling", "--model=there", "--count=2"])
    said = capsys.readouterr().out
    for table in said.split("\n\n")[1:4]:
        assert table.splitlines()[1] == "| sampler | 5 | 8 | 40 |"
        assert table.splitlines()[3:] == [
            "| euler | 0.500 | 0.500 | 0.500 |",
            "| dpmpp_2m | 0.000 | 0.000 | 0.500 |",
            "| heun | 0.000 | 0.500 | 0.500 |",  # two evaluations a step
            "| ddpm | 0.000 | 0.000 | 0.000 |",
        ]
    assert said.endswith("euler is ddim with eta=0; euler_ancestral is ddpm\n")
    painter.config.model.out_channels, painter.needs["euler_ancestral"] = 8, 9
    main(["sampling", "--model=there", "--count=2"])
    assert "| euler_ancestral | 0.000 | 0.000 | 0.500 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["sampling"], "one of the arguments --config --model is required"),
        (["memory", "--model=there"], "--model is for sampling, without --config"),
        (["sampling", "--model=there", "--config.seed=1"], "--model is for sampling, without --config"),
        (["sampling", f"--config={CONFIG}", "--count=2"], "--count needs --model"),
        (["sampling", "--model=there", "--count=0"], "--count is 0; it must be 1 or more"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, says, capsys):
    with pytest.raises(SystemExit) as exit:
        main(flags)
    assert exit.value.code == 2 and says in capsys.readouterr().err
