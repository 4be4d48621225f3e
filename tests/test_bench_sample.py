"""Speed of the sampler: what is compared draws the same, what is printed follows from what was timed."""

import contextlib
import json
import re
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from dit_jax.bench import presets, sample
from dit_jax.bench.__main__ import main
from dit_jax.models.dit import DiT
from dit_jax.sharding import make_mesh

TINY = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "attention_head_dim": 8, "modulation": "adaln_zero",
        "out_channels": 8}  # fmt: skip


compile_for = sample.compile_for


@pytest.fixture(scope="module")
def tiny() -> Iterator[None]:
    """``small`` is tiny, on latents of 4 x 4, and learns its variance; parameters and samplers are made once."""
    kept = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "small", presets.Preset(TINY, 4))
        patch.setattr(presets, "SIDE", 4)
        patch.setattr(presets, "TEXT", {"text_length": 5, "text_width": 7, "pooled_width": 6})
        state = presets.make_bench("small", 1, "float32", 0.0).state(make_mesh(jax.devices()[:1]))
        patch.setattr(presets.Bench, "state", lambda *_: state)

        def compile_once(bench, params, *how):
            if how not in kept:
                kept[how] = compile_for(bench, params, *how)
            return kept[how]

        patch.setattr(sample, "compile_for", compile_once)
        patch.setattr(sample, "empty_cache", contextlib.nullcontext)
        patch.setitem(sample.VAE_CONFIG, "block_out_channels", (32, 32))
        yield


@pytest.mark.usefixtures("tiny")
def test_bench_sample_compares_what_draws_the_same_and_its_figures_follow_from_its_seconds(
    capsys, monkeypatch, tmp_path
):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: model)  # takes a minute
    file = tmp_path / "said.json"
    main(["sample", "--preset=small", "--ref=torch", "--batch=2", "--steps=5", "--rounds=3", f"--json={file}"])
    said = capsys.readouterr().out
    assert len(re.findall(r"^ratio to torch eager: \d+\.\d\d \(", said, re.MULTILINE)) == 1
    assert "\nat batch 1, ratio to torch eager: " in said
    parts = json.loads(file.read_text())
    agreements = [part["agreement eager"] for part in parts if "agreement eager" in part]
    assert len(agreements) == 2 and max(agreements) < 1e-3
    rows = {(part["name"], part["batch"]): part for part in parts if "evaluations" in part}
    names = ["dit_jax", "dit_jax, guided from 0.8 to 0.2", "the VAE's decoder", "torch eager", "torch compile"]
    assert list(rows) == [(name, B) for B in (1, 2) for name in names]
    share = next(part["share of the VAE"] for part in parts if "share of the VAE" in part)
    decoding, sampling = (np.asarray(rows[name, 2]["seconds"]) for name in ("the VAE's decoder", "dit_jax"))
    assert share["median"] == pytest.approx(np.median(decoding / (decoding + sampling)))
    for (_, B), row in rows.items():
        assert len(row["seconds"]) == 3
        assert row["images_per_second"] == pytest.approx(B / np.median(row["seconds"]))


@pytest.mark.usefixtures("tiny")
def test_a_torch_sampler_that_draws_something_else_is_refused(monkeypatch):
    pytest.importorskip("torch")
    from dit_jax.bench import reference

    true = reference.make_sampler
    monkeypatch.setattr(reference, "make_sampler", lambda *args: true(*args[:4], 1.01 * args[4], args[5]))
    with pytest.raises(AssertionError, match="torch draws something else"):
        list(sample.measure_sampling("small", 1, "float32", 5, 1, against_torch=True))


@pytest.mark.usefixtures("tiny")
def test_the_network_is_asked_as_often_as_is_said(monkeypatch):
    asked, predict = [], DiT.predict

    def counting(self, x_t, *rest):
        jax.debug.callback(lambda: asked.append(len(x_t)))
        return predict(self, x_t, *rest)

    monkeypatch.setattr(DiT, "predict", counting)
    bench = presets.make_bench("small", 3, "float32", 0.0)
    bench.config.sample.steps = 5  # at t = 1, 0.8, ... 0.2; 0.8 in float32 is above 0.8
    made = compile_for(bench, bench.state(make_mesh(jax.devices()[:1])).params, 3, sample.INTERVAL)
    assert np.isfinite(made.draw()).all()
    jax.effects_barrier()
    assert sum(asked) == 3 * made.evaluations == 3 * (3 * 2 + 2)
