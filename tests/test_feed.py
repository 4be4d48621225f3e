"""What training is fed with: several shapes of pictures, and data that never come."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax import build, feed, train
from dit_jax.errors import DataError
from dit_jax.precompute import precompute
from dit_jax.processes import rows_of
from dit_jax.resolve import resolve
from dit_jax.sharding import make_mesh
from dit_jax.training.state import init_params
from dit_jax.training.step import TrainStep
from tests.noise_pictures import SQUARE, TALL, WIDE, draw_noise
from tests.tiny_run import tiny_config, train_tiny
from tests.toy import randomise

ALL = range(4)  # rows of a batch


def open_feed(config, workdir):
    vae, text_encoder = build.make_vae(config), build.make_text_encoder(config)
    source = build.make_source(config, "train")
    resolve(config, len(source), vae.shape, text_encoder.shape, 1)
    listed = workdir / "bad_records.jsonl"
    return feed.open_feed(config, source, vae, vae, text_encoder, lambda line: None, listed=listed, kept=None)


def test_every_shape_is_compiled_before_the_first_step_and_never_again(tmp_path, monkeypatch):
    source = draw_noise(tmp_path / "pictures", [WIDE, TALL, SQUARE, WIDE] * 4)
    done = []
    compile, write = TrainStep.compile, train.Writer.metrics

    def noted(self, state, batch):
        done.append(batch["mean"].shape[1:3])
        return compile(self, state, batch)

    monkeypatch.setattr(TrainStep, "compile", noted)
    monkeypatch.setattr(train.Writer, "metrics", lambda self, step, row: done.append(step) or write(self, step, row))
    run = train_tiny(
        tmp_path / "run",
        data__source=source,
        data__buckets="3",
        batch_size="4",
        total_steps="12",
        log_every="1",
        sample_every="12",
    )
    assert sorted(done[:3]) == [(6, 10), (8, 8), (10, 6)] and done[3:] == list(range(1, 13))
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 12


def test_a_batch_has_one_shape_and_every_picture_its_own(tmp_path):
    source = draw_noise(tmp_path / "pictures", [WIDE] * 8 + [TALL] * 8)
    config = tiny_config(data__source=source, data__buckets="3", batch_size="4")
    found = open_feed(config, tmp_path)
    shapes = [batch["mean"].shape[1:3] for batch in found.batches(0, 40, ALL)]
    assert set(shapes) == set(found.grids) == {(6, 10), (10, 6)}
    assert 12 <= shapes.count((6, 10)) <= 28  # half of the pictures are wide
    again = [batch["mean"] for batch in found.batches(7, 12, ALL)]
    for one, other in zip(again, list(found.batches(0, 12, ALL))[7:], strict=True):
        np.testing.assert_array_equal(one, other["mean"])


@pytest.mark.parametrize("encode", ["once", "every_step"])
def test_several_processes_share_every_batch(tmp_path, encode):
    """With a bad record, and two shapes of pictures."""
    source = draw_noise(tmp_path / "pictures", [WIDE] * 8 + [TALL] * 8)
    bad = sorted((tmp_path / "pictures").glob("*.png"))[5]
    bad.write_bytes(bad.read_bytes()[:200])
    found = open_feed(
        tiny_config(data__source=source, data__buckets="3", batch_size="4", data__encode=encode), tmp_path
    )
    halves = [list(found.batches(0, 10, rows_of(4, p, 2))) for p in (0, 1)]
    for whole, *parts in zip(found.batches(0, 10, ALL), *halves, strict=True):
        for key, array in whole.items():
            joined = np.concatenate([part[key] for part in parts]).astype(np.float32)
            atol = 0 if encode == "once" else 1e-2  # another number of pictures in the encoders' jit, bfloat16
            np.testing.assert_allclose(joined, array.astype(np.float32), atol=atol, rtol=atol)
    assert bad.name in (tmp_path / "bad_records.jsonl").read_text()


@pytest.mark.parametrize("seed", range(4))
def test_a_shape_whose_only_picture_is_bad_has_no_turn(tmp_path, seed):
    """For some of these seeds it was the first."""
    source = draw_noise(tmp_path / "pictures", [WIDE] + [TALL] * 8 + [SQUARE] * 8)
    bad = min((tmp_path / "pictures").glob("*.png"))
    bad.write_bytes(bad.read_bytes()[:200])
    found = open_feed(tiny_config(data__source=source, data__buckets="3", batch_size="4", seed=str(seed)), tmp_path)
    assert {batch["mean"].shape[1:3] for batch in found.batches(0, 20, ALL)} == {(8, 8), (10, 6)} == set(found.grids)


def test_measured_latents_of_several_shapes_have_unit_variance(tmp_path):
    source = draw_noise(tmp_path / "pictures", [WIDE] * 8 + [TALL] * 8)
    config = tiny_config(data__source=source, data__buckets="3", batch_size="4", latents__normalize="measured")
    found = open_feed(config, tmp_path)
    scale = build.make_latents(config)
    pixels = [scale.to_model(batch["mean"].astype(np.float32)).reshape(-1, 4) for batch in found.batches(0, 40, ALL)]
    np.testing.assert_allclose(np.concatenate(pixels).std(0), 1.0, atol=0.1)


class Silent:
    """A source whose pictures stop coming."""

    name = "silent"

    def __init__(self, source, last):
        self._source, self._last = source, last

    def __getattr__(self, name):
        return getattr(self._source, name)

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        if self._last == 0:
            import threading

            threading.Event().wait()
        self._last -= 1
        return self._source[index]


@pytest.mark.parametrize(("encode", "last"), [("once", 4), ("once", 20), ("every_step", 20)])
def test_data_that_stop_coming_end_the_run(encode, last, tmp_path, monkeypatch):
    make_source = build.make_source
    monkeypatch.setattr(build, "make_source", lambda *args: Silent(make_source(*args), last))
    with pytest.raises(DataError, match=r"nothing came for 1\.5 seconds.*data\.patience"):
        train_tiny(tmp_path, data__encode=encode, data__patience="1.5")


# --- validation ---------------------------------------------------------------------------------------------


def open_validation(config, listed=None, say=lambda line: None):
    """The encoded records to validate on, and what scores random parameters of the config on them."""
    vae, text_encoder = build.make_vae(config), build.make_text_encoder(config)
    resolve(config, 20, vae.shape, text_encoder.shape, 1)
    config.latents.shift, config.latents.scale = (0.1,) * 4, (0.9,) * 4
    source = build.make_validation_source(config)
    records = feed.open_validation(config, source, vae, text_encoder, say, listed=listed, kept=None)
    model, process = build.make_model(config, jnp.float32), build.make_process(config)
    params = randomise(jax.eval_shape(lambda key: init_params(model, key, 8, 8), jax.random.key(0)), 1)
    validation = build.make_validation(config, model, process, records, make_mesh(jax.devices()[:1]))
    return records, functools.partial(validation, params)


@pytest.mark.slow
def test_the_same_records_validate_however_they_come_and_whatever_the_seed(tmp_path):
    """A cache holds mirror images, and an every_step run cuts at random places; neither is validated on."""
    source = draw_noise(tmp_path / "pictures", [WIDE, TALL, SQUARE] * 8, bad=(4,))
    changes = {
        "data__source": source,
        "data__validation_fraction": "0.4",
        "data__buckets": "3",
        "data__flip": "on",
        "data__max_bad_fraction": "0.2",
    }
    precompute(tiny_config(**changes), tmp_path / "cache", 0, 1, 4096)
    ways = {
        "once": {},
        "every_step": {"data__encode": "every_step", "data__crop": "random", "seed": "5"},
        "cache": {"data__source": f"cache:{tmp_path / 'cache'}"},
    }
    opened = {name: open_validation(tiny_config(**changes | way)) for name, way in ways.items()}
    records, score = opened["once"]
    names = list(records.ids())
    assert len(records) - records.bad.sum() > 5 and len(np.unique(records.bucket)) > 1
    expected = score()
    for name, (other, score) in opened.items():
        assert list(other.ids()) == names and np.array_equal(other.bad, records.bad), name
        np.testing.assert_allclose(score(), expected, rtol=1e-5, err_msg=name)


def test_a_few_of_the_records_set_aside_are_as_if_fewer_had_been_set_aside(tmp_path):
    changes = {"data__num_pictures": "200", "data__validation_fraction": "0.4"}
    few = list(build.make_validation_source(tiny_config(**changes, data__validation_records="9")).ids())
    assert len(few) == 9
    for fraction in np.linspace(0.01, 0.1, 91):  # one of them sets just those aside
        found = list(
            build.make_source(tiny_config(**changes | {"data__validation_fraction": str(fraction)}), "validation").ids()
        )
        if len(found) >= 9:
            break
    assert set(few) <= set(found) and len(found) <= 11
    everything = build.make_validation_source(tiny_config(**changes, data__validation_records="1000"))
    assert list(everything.ids()) == list(build.make_source(tiny_config(**changes), "validation").ids())


def test_bad_records_do_not_validate_and_are_listed(tmp_path):
    """Two of a few: training would bear one."""
    source = draw_noise(tmp_path / "pictures", [SQUARE] * 12)
    config = tiny_config(data__source=source, data__validation_fraction="0.5")
    names = [Path(id).name for id in build.make_validation_source(config).ids()]
    for name in names[:2]:
        (tmp_path / "pictures" / name).write_bytes(b"no picture")
    said = []
    records, score = open_validation(config, tmp_path / "bad_records.jsonl", said.append)
    assert said[-1] == f"validation: {len(names) - 2} records, 2 bad ones left out"
    listed = [json.loads(line)["id"] for line in (tmp_path / "bad_records.jsonl").read_text().splitlines()]
    assert {Path(id).name for id in listed} == set(names[:2])
    assert np.isfinite(score()).all() and (np.flatnonzero(records.bad) == [0, 1]).all()


def test_records_that_are_all_bad_cannot_validate(tmp_path):
    source = draw_noise(tmp_path / "pictures", [SQUARE] * 6, bad=range(6))
    with pytest.raises(DataError, match="all .* records of folder:.* to validate on are bad"):
        open_validation(tiny_config(data__source=source, data__validation_fraction="0.9"))
