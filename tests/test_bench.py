"""What a model takes: remat keeps less, in the traced step and in the compiled one, and the program says so."""

import re

import jax
import pytest

from dit_jax import bench
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
