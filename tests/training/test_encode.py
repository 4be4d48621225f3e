"""What is kept of pictures and captions, whichever shards it comes in; the start check sees trouble."""

import jax
import numpy as np
import pytest

from dit_jax.arrays import to_signed
from dit_jax.data.cache.gather import in_memory
from dit_jax.data.cache.parts import tabulate, units
from dit_jax.data.shapes_world import ShapesWorld
from dit_jax.data.sources.records import BadRecord
from dit_jax.encoders import load_text_encoder, load_vae
from dit_jax.encoders.latents import LatentScale
from dit_jax.errors import DataError
from dit_jax.training import encode

N = 11


@pytest.fixture(scope="module")
def frozen():
    return load_vae("embedded"), load_text_encoder("embedded")


@pytest.fixture(scope="module")
def source():
    return ShapesWorld(seed=1, num_pictures=N, objects=(1, 2), combinations="seen")


class OneIsBad:
    """A source of which a record cannot be read."""

    name = "one is bad"

    def __init__(self, source, bad):
        self._source, self._bad = source, bad
        self.ids, self.captions = source.ids, source.captions

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        if index == self._bad:
            raise BadRecord(str(index), "on purpose")
        return self._source[index]


def encoding(frozen, source, mirrored=False, per_shard=4, dtype="float16"):
    vae, text = frozen
    table = tabulate(source, np.zeros(len(source), np.uint8))
    identity = {
        "data": {"name": "", "fingerprint": "", **table.counts(1)},
        "mirrored": mirrored,
        "buckets": [[64, 64]],
        "vae": {"factor": vae.factor, "channels": vae.shape.channels},
        "text_encoder": {"width": text.width, "pooled_width": text.pooled_width},
        "storage_dtype": dtype,
        "records_per_shard": per_shard,
        "captions_per_shard": per_shard,
    }
    return encode.Encoding(identity, source, table, vae, text, 2, 0, 10.0)


def encode_all(wanted):
    told = []
    shards = encode.encode_units(wanted, units(wanted.identity), lambda unit, count: told.append((unit, count)))
    return dict(shards), told


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_record_is_kept_as_the_encoders_return_it(frozen, source, mirrored):
    vae, text = frozen
    wanted = encoding(frozen, source, mirrored)
    cache = in_memory(wanted.identity, wanted.table, encode_all(wanted)[0].values())
    records = [source[i] for i in range(N)]
    images = to_signed(np.stack([record.image for record in records]))
    states = text([record.captions[0] for record in records])
    for side in {False, mirrored}:
        batch = cache.gather(np.arange(N), np.zeros(N, np.uint64), np.full(N, side))
        mean, std = vae.encode(images[:, :, ::-1] if side else images)
        np.testing.assert_allclose(batch["mean"], mean, rtol=2e-3, atol=2e-3)  # float16 has 11 bits
        np.testing.assert_allclose(batch["std"], std, rtol=2e-3, atol=2e-3)
        assert {array.dtype.name for array in batch.values()} == {"float16", "bfloat16", "bool"}
    S = cache.longest
    assert S == int(states.mask.sum(1).max()) < text.length
    np.testing.assert_array_equal(batch["mask"], states.mask[:, :S])
    np.testing.assert_allclose(batch["hidden"].astype(np.float32), states.hidden[:, :S], rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(batch["pooled"].astype(np.float32), states.pooled, rtol=1e-2, atol=1e-2)
    assert not batch["hidden"][~batch["mask"]].any()


def test_a_shard_is_the_same_bit_for_bit_whichever_others_are_made_with_it(frozen, source):
    wanted = encoding(frozen, source)
    together, _ = encode_all(wanted)
    assert [(unit.kind, len(unit)) for unit in together] == [("pictures", 4)] * 2 + [("pictures", 3)] + [
        ("texts", len(unit)) for unit in together if unit.kind == "texts"
    ]
    for some in (list(together)[1:2], list(together)[::-2]):
        for unit, shard in encode.encode_units(wanted, some, lambda unit, count: None):
            for one, other in zip(shard[:3], together[unit][:3], strict=True):
                np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_what_was_done_is_told_once(frozen, source):
    shards, told = encode_all(encoding(frozen, source))
    for unit in shards:
        assert sum(count for who, count in told if who == unit) == len(unit)


def test_pictures_are_encoded_by_as_many_as_fit_whatever_a_shard_holds(frozen, source, monkeypatch):
    monkeypatch.setattr(encode, "CHUNK_PIXELS", 4 * 64 * 64)
    _, told = encode_all(encoding(frozen, source, per_shard=5))
    assert [count for unit, count in told if unit.kind == "pictures"] == [4, 1, 4, 1, 1]


def test_a_bad_record_is_empty_and_named(frozen, source):
    shards, _ = encode_all(encoding(frozen, OneIsBad(source, 6)))
    [(unit, shard)] = [(unit, shard) for unit, shard in shards.items() if unit.kind == "pictures" and shard.problems]
    assert unit.number == 1 and shard.problems == {2: "on purpose"}
    assert shard.bad.tolist() == [False, False, True, False]
    assert not shard.moments[2].any() and shard.moments[[0, 1, 3]].any(axis=(1, 2, 3, 4, 5)).all()


def test_latents_that_are_not_finite_end_the_work_with_the_records_id(frozen, source):
    vae, text = frozen

    class Overflowing:
        factor, shape = vae.factor, vae.shape

        def encode(self, images):
            mean, std = map(np.array, vae.encode(images))
            mean[-1, 0, 0, 0] = 1e6  # more than float16 holds
            return mean, std

    encode_all(encoding((Overflowing(), text), source, dtype="float32"))
    last = list(source.ids())[3]
    with pytest.raises(DataError, match=f"latents of {last} are not finite as float16.*float32"):
        encode_all(encoding((Overflowing(), text), source))


def test_every_step_gives_the_dtypes_of_a_cache(frozen, source):
    vae, text = frozen
    ids, mask = text.tokenize([source[i].captions[0] for i in range(4)])
    raw = {"image": np.stack([source[i].image for i in range(4)]), "ids": ids, "mask": mask}
    [batch] = encode.encode_every_step([raw], vae, text, "float16")
    wanted = encoding(frozen, source)
    kept = in_memory(wanted.identity, wanted.table, encode_all(wanted)[0].values())
    kept = kept.gather(np.arange(4), np.zeros(4, np.uint64), np.zeros(4, bool))
    S = kept["mask"].shape[1]
    assert not batch["mask"][:, S:].any()
    for key, array in kept.items():
        ours = batch[key][:, :S] if key in ("hidden", "mask") else batch[key]
        assert ours.dtype == array.dtype and ours.shape == array.shape, key
        np.testing.assert_allclose(ours.astype(np.float32), array.astype(np.float32), rtol=1e-2, atol=1e-2, err_msg=key)


def check(frozen, source, images, shown=True, **changes):
    vae, text = frozen
    mean, std = vae.encode(to_signed(images))
    mask = text.tokenize([source[i].captions[0] for i in range(len(images))])[1]
    given = {"vae": vae, "preview": vae, "latents": vae.latent_scale, "images": images if shown else None, **changes}
    return encode.check_start({"mean": np.asarray(mean), "std": np.asarray(std), "mask": mask}, **given)


def test_the_start_check_is_quiet_when_all_is_well_and_names_what_is_not(frozen, source):
    vae, _ = frozen
    images = np.stack([source[i].image for i in range(N)])
    good = check(frozen, source, images)
    assert good.warnings() == [] and good.psnr > 25 and 8 < good.tokens < 25
    off = LatentScale(vae.latent_scale.shift, vae.latent_scale.scale * 30)
    assert "latents.normalize=measured" in check(frozen, source, images, latents=off).warnings()[0]
    noise = np.random.default_rng(0).integers(0, 255, images.shape).astype(np.uint8)
    assert "dB: is it made for such pictures?" in check(frozen, source, noise).warnings()[0]
    stranger = load_vae("embedded")
    stranger.params = jax.tree.map(lambda leaf: -leaf, stranger.params)
    found = check(frozen, source, images, preview=stranger)
    assert found.psnr == good.psnr and "is it made for latents of this VAE?" in found.warnings()[0]


def test_without_pictures_the_start_check_looks_at_the_latents_alone(frozen, source):
    images = np.stack([source[i].image for i in range(N)])
    without = check(frozen, source, images, shown=False)
    assert without.psnr is None and without.preview_psnr is None and without.warnings() == []
    assert without.latent_std == check(frozen, source, images).latent_std
