"""Float16 from end to end: a run with overflows resumes bit for bit, and pictures are those of float32."""

import json
from pathlib import Path

import numpy as np
import pytest

from dit_jax.sample import Pipeline
from dit_jax.training import loss_scale
from tests.test_train import assert_same_run, leaves
from tests.tiny_run import train_tiny


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def restless(monkeypatch):
    """A scale that soon overflows and grows back at once: there are overflows before step 9 and after."""
    monkeypatch.setattr(loss_scale, "START", 2.0**24)
    monkeypatch.setattr(loss_scale, "GROW_EVERY", 1)


def test_a_run_in_float16_stopped_at_9_and_resumed_is_the_same_run(restless, tmp_path, capsys):
    changes = {"dtype": "float16", "sample_every": "0", "log_every": "1"}
    whole, parts = train_tiny(tmp_path / "whole", **changes), tmp_path / "parts"
    assert "compute in float16 with a dynamic loss scale" in capsys.readouterr().out
    for stop in ({"stop_at_step": "9"}, {}):
        train_tiny(parts, **changes, **stop)
    assert_same_run(whole, parts, 20)

    skipped = [row["skipped"] for row in rows(whole)]
    assert 0 < skipped[8] < skipped[-1] < 20
    for row, before in zip(rows(whole), [0, *skipped], strict=False):
        assert (row["grad_norm"] is None) == (row["skipped"] > before)
    counts = {name: int(n) for name, n in leaves(whole, 20).items() if name.endswith("/count")}
    assert counts and set(counts.values()) == {20 - skipped[-1]}  # updates made, not steps done
    plain = train_tiny(tmp_path / "plain", **changes | {"dtype": "float32"})
    assert [row["learning_rate"] for row in rows(plain)] == [row["learning_rate"] for row in rows(whole)]


def test_16_bits_draw_what_float32_draws(tiny_run):
    exact = Pipeline.load(tiny_run)
    pictures = {}
    for dtype in ("float32", "float16", "bfloat16"):
        config = exact.config.copy_and_resolve_references()
        config.dtype = dtype
        pipe = Pipeline(config, exact.vae, exact.text_encoder, exact.params, exact.trained)
        pictures[dtype] = pipe.draw(["a large red circle", "a small blue square"], [3, 4]).astype(np.float32)
    spread = pictures["float32"].std()
    for dtype, bound in (("float16", 0.01), ("bfloat16", 0.08)):
        distance = np.sqrt(np.square(pictures[dtype] - pictures["float32"]).mean()) / spread
        assert 0 < distance < bound, dtype
