"""The validation loss: what it is of networks that are known, and what it must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.data.cache.gather import in_memory
from dit_jax.data.cache.parts import Pictures, Texts, tabulate, units
from dit_jax.diffusion import mixture
from dit_jax.diffusion.process import CONVERSIONS, Process
from dit_jax.diffusion.schedules import SCHEDULES, make_schedule
from dit_jax.sharding import make_mesh, replicated
from dit_jax.training.validation import LOG_SNRS, Validation, as_row, in_words, x0_errors
from tests.toy import Toy

PLACES = jnp.arange(4, dtype=jnp.int32)
X0 = 1.5 * jax.random.normal(jax.random.key(5), (4, 6, 6, 3)) + 0.5

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def errors_of(process, answer, x0=X0, places=PLACES):
    """Errors ``[K, B]`` of a network that answers ``answer(x_t, t)``, given and returned as targets."""
    return np.asarray(jax.jit(lambda x0: x0_errors(answer, process, x0, places))(x0))


@each_schedule
@pytest.mark.parametrize("prediction", CONVERSIONS)
def test_a_network_that_knows_the_truth_has_no_error(schedule, prediction):
    process = Process(make_schedule(schedule, 1.0), prediction)
    errors = errors_of(process, lambda x_t, t: getattr(process.from_x0(X0, x_t, t), prediction))
    assert errors.shape == (len(LOG_SNRS), 4) and errors.max() < 1e-9


def test_a_network_that_says_zero_has_the_power_of_the_latents():
    process = Process(make_schedule("cosine", 1.0), "x0")
    errors = errors_of(process, lambda x_t, t: jnp.zeros_like(x_t))
    expected = np.square(np.asarray(X0)).mean((1, 2, 3))
    np.testing.assert_allclose(errors, np.broadcast_to(expected, errors.shape), rtol=1e-5)


def test_noise_at_a_level_is_what_the_level_says():
    """A network that takes x_t for the scaled picture errs by the noise, whose share the level is: exp(-log_snr)."""
    process = Process(make_schedule("scaled_linear", 1.0), "x0")
    x0 = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
    errors = errors_of(process, lambda x_t, t: x_t / process.schedule.alpha(t)[:, None, None, None], x0).mean(1)
    np.testing.assert_allclose(errors, np.exp(-np.array(LOG_SNRS, float)), rtol=0.05)


@each_schedule
def test_one_answer_has_one_error_whatever_it_is_called(schedule):
    process = {name: Process(make_schedule(schedule, 1.0), name) for name in CONVERSIONS}

    def answer(name):
        return lambda x_t, t: getattr(process[name].from_x0(jnp.tanh(x_t), x_t, t), name)

    found = {name: errors_of(process[name], answer(name)) for name in CONVERSIONS}
    assert found["x0"].min() > 1e-3
    for name in CONVERSIONS:
        np.testing.assert_allclose(found[name], found["x0"], rtol=1e-3, err_msg=name)


def test_a_perfect_network_has_the_same_error_on_every_schedule():
    x0 = jnp.asarray(mixture.quantiles(np.random.default_rng(0).random((4, 16, 16, 3))), jnp.float32)
    found = {}
    for name in SCHEDULES:
        process = Process(make_schedule(name, 1.0), "x0")
        denoise = mixture.make_denoise(process)
        found[name] = errors_of(process, lambda x_t, t, denoise=denoise: denoise(x_t, t).x0, x0).mean(1)
    assert (np.diff(found["edm"]) < 0).all() and found["edm"][0] > 0.5 and found["edm"][-1] < 0.01
    for name in SCHEDULES:
        np.testing.assert_allclose(found[name], found["edm"], rtol=2e-3, err_msg=name)


def test_channels_of_a_learned_variance_are_left_out():
    process = Process(make_schedule("linear", 1.0), "x0")
    alone = errors_of(process, lambda x_t, t: x_t / 2)
    both = errors_of(process, lambda x_t, t: jnp.concatenate([x_t / 2, jnp.full_like(x_t, 9.0)], -1))
    np.testing.assert_array_equal(alone, both)


# --- over records -------------------------------------------------------------------------------------------

SHAPES = ((8, 12), (8, 8))  # of pictures; the VAE's factor is 2


class Named:
    """A source of so many records, whose pictures nobody asks for."""

    name = "named"

    def __init__(self, n):
        self._n = n

    def __len__(self):
        return self._n

    def ids(self):
        return (str(i) for i in range(self._n))

    def captions(self):
        return ((f"caption {i}", "another") for i in range(self._n))


def encoded(toy, bucket, bad=()):
    """Random encoded records; the second caption of all of them is the same."""
    m, random = toy.model, np.random.default_rng(0)
    table = tabulate(Named(len(bucket)), np.array(bucket, np.uint8))
    identity = {
        "data": {"fingerprint": "", **table.counts(len(SHAPES))},
        "buckets": [list(shape) for shape in SHAPES],
        "mirrored": False,
        "storage_dtype": "float16",
        "vae": {"factor": 2, "channels": m.in_channels},
        "text_encoder": {"width": m.text_width, "pooled_width": m.pooled_width},
        "records_per_shard": 4,
        "captions_per_shard": 4,
    }
    shards = []
    for unit in units(identity):
        if unit.kind == "pictures":
            shard = Pictures.zeros(identity, unit)
            shard.moments[:] = random.normal(size=shard.moments.shape)
            shard.bad[:] = [int(table.ids[i]) in bad for i in unit.records(table)]
        else:
            lengths = [2 + i % (m.text_length - 1) for i in range(len(unit))]
            hidden = random.normal(size=(sum(lengths), m.text_width)).astype(jnp.bfloat16)
            pooled = random.normal(size=(len(unit), m.pooled_width)).astype(jnp.bfloat16)
            shard = Texts(hidden, np.cumsum([0, *lengths]), pooled)
        shards.append(shard)
    return in_memory(identity, table, shards)


def score(toy, records, batch_size, devices=1):
    mesh = make_mesh(jax.devices()[:devices])
    process = Process(make_schedule("rectified_flow", 1.0), "flow")
    validation = Validation(toy.model, process, lambda raw: raw * 2.0, records, batch_size, mesh)
    return validation(jax.device_put(toy.params, replicated(mesh))), len(validation)


def test_records_are_scored_one_by_one_whatever_is_with_them():
    """By hand: each good record alone, its posterior mean, its first caption, no dropout, its own shape and place."""
    toy = Toy(seed=5)  # far from the truth at every level of noise
    bucket, bad = [0, 1, 1, 0, 1, 0, 1], (2, 5)
    records, errors = encoded(toy, bucket, bad), []
    process = Process(make_schedule("rectified_flow", 1.0), "flow")
    for i in range(len(bucket)):
        if i in bad:
            continue
        batch = records.gather(np.array([i]), np.array([0], np.uint64), np.array([False]))
        text = toy.text._replace(
            hidden=jnp.asarray(batch["hidden"], jnp.float32),
            pooled=jnp.asarray(batch["pooled"], jnp.float32),
            mask=batch["mask"],
        )
        x0 = 2.0 * jnp.asarray(batch["mean"], jnp.float32)
        errors.append(
            errors_of(process, lambda x_t, t, text=text: toy.apply(toy.params, x_t, t, text), x0, jnp.array([i]))
        )
    expected = np.concatenate(errors, 1).mean(1)
    assert expected.min() > 1e-2
    for batch_size in (2, 3, 64):
        found, count = score(toy, records, batch_size)
        assert count == 5
        np.testing.assert_allclose(found, expected, rtol=2e-5, err_msg=str(batch_size))


def test_the_number_of_devices_changes_nothing(toy):
    assert jax.device_count() > 1
    records = encoded(toy, [1] * 5)
    one, many = score(toy, records, 4)[0], score(toy, records, jax.device_count(), jax.device_count())[0]
    np.testing.assert_allclose(one, many, rtol=2e-5)


def test_every_shape_is_compiled_once(toy, monkeypatch):
    traced = []
    split = Process.split
    monkeypatch.setattr(Process, "split", lambda *args: traced.append(args[1].shape) or split(*args))
    mesh = make_mesh(jax.devices()[:1])
    process = Process(make_schedule("rectified_flow", 1.0), "flow")
    validation = Validation(toy.model, process, lambda raw: raw, encoded(toy, [0, 1] * 4), 2, mesh)
    first, again = validation(toy.params), validation(toy.params)
    assert len(traced) == len(set(traced)) == 2
    np.testing.assert_array_equal(first, again)


def test_a_row_has_the_mean_and_every_level():
    errors = np.linspace(1.0, 0.4, len(LOG_SNRS))
    row = as_row(errors)
    assert row["validation_x0_error"] == pytest.approx(0.7) and len(row) == 14
    assert row["validation_x0_error/log_snr=-5"] == 1.0 and row["validation_x0_error/log_snr=7"] == 0.4
    assert in_words(errors) == "x0_error=0.7000 (log-SNR -5: 1.0000, 1: 0.7000, 7: 0.4000)"
