"""What a model takes: remat keeps less, in the traced step and in the compiled one, and the program says so; and how
quick and how large its data are."""

import re

import jax
import pytest

from dit_jax import bench
from dit_jax.data.cache.made_up import make_up
from dit_jax.training.memory import residual_bytes
from tests.tiny_run import CONFIG

# so that activations are more than parameters and optimizer
SMALL = {"batch_size": 64, "optimizer": "adamw", "model.hidden_size": 64, "model.num_layers": 3, "model.num_heads": 4,
         "model.attention_head_dim": 16, "model.text_mode": "pooled", "model.dropout": 0.1}  # fmt: skip


def rows(capsys, *flags: str) -> dict[str, list[int]]:
    bench.main(["memory", f"--config={CONFIG}", *(f"--config.{k}={v}" for k, v in SMALL.items()), *flags])
    lines = re.findall(r"^\| (\w+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", capsys.readouterr().out, re.MULTILINE)
    return {name: [int(n.replace(",", "")) for n in numbers] for name, *numbers in lines}


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
        bench.main(["memory", f"--config={CONFIG}", "--batch=8"])
    assert exit.value.code == 2 and "unrecognized argument --batch" in capsys.readouterr().err


def measure_data(capsys, monkeypatch, *flags: str) -> str:
    for name, value in {"RECORDS": 300, "PER_SHARD": 64, "SECONDS": 0.01, "ROUNDS": 1, "WARM_UP": 1}.items():
        monkeypatch.setattr(bench, name, value)
    bench.main(["data", f"--config={CONFIG}", "--config.batch_size=8", *flags])
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
        monkeypatch.setattr(bench, name, value)
    bench.main(["sampling", f"--config={CONFIG}"])
    said = capsys.readouterr().out
    errors = {
        name: [float(a), float(b)]
        for name, a, b in re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \|$", said, re.M)[1:4]
    }
    assert 3 < errors["euler"][0] / errors["euler"][1] < 5  # first order
    assert errors["dpmpp_2m"][0] / errors["dpmpp_2m"][1] > 8 and errors["heun"][0] / errors["heun"][1] > 8  # second
    assert errors["dpmpp_2m"][1] < errors["euler"][1]
