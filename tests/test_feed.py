"""What training is fed with: several shapes of pictures, and data that never come."""

import numpy as np
import pytest

from dit_jax import build, feed, train
from dit_jax.errors import DataError
from dit_jax.resolve import resolve
from dit_jax.training.step import TrainStep
from tests.noise_pictures import SQUARE, TALL, WIDE, draw_noise
from tests.tiny_run import tiny_config, train_tiny


def open_feed(config, workdir):
    vae, text_encoder = build.make_vae(config), build.make_text_encoder(config)
    source = build.make_source(config, "train")
    resolve(config, len(source), vae.shape, text_encoder.shape, 1)
    return feed.open_feed(config, workdir, source, vae, vae, text_encoder, lambda line: None)


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
    shapes = [batch["mean"].shape[1:3] for batch in found.batches(0, 40)]
    assert set(shapes) == set(found.grids) == {(6, 10), (10, 6)}
    assert 12 <= shapes.count((6, 10)) <= 28  # half of the pictures are wide
    again = [batch["mean"] for batch in found.batches(7, 12)]
    for one, other in zip(again, list(found.batches(0, 12))[7:], strict=True):
        np.testing.assert_array_equal(one, other["mean"])


def test_measured_latents_of_several_shapes_have_unit_variance(tmp_path):
    source = draw_noise(tmp_path / "pictures", [WIDE] * 8 + [TALL] * 8)
    config = tiny_config(data__source=source, data__buckets="3", batch_size="4", latents__normalize="measured")
    found = open_feed(config, tmp_path)
    scale = build.make_latents(config)
    pixels = [scale.to_model(batch["mean"].astype(np.float32)).reshape(-1, 4) for batch in found.batches(0, 40)]
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
