"""Contract 6: which record a sample is, is a function of its position, and every record has its turn."""

import pickle
import time
from itertools import islice

import numpy as np
import pytest

from dit_jax.data.order import (
    SLOTS,
    Purpose,
    caption_words,
    crop_place,
    is_mirrored,
    make_order,
    permutation,
    random_words,
    words_at,
)
from dit_jax.errors import DataError

SEED, B = 7, 4


def plain(n, batch_size=B):
    """The order of one source of squares."""
    return make_order([(n, 1.0)], None, batch_size, SEED)


# --- one source ---------------------------------------------------------------------------------------------


def test_every_record_comes_once_per_epoch_in_another_order():
    orders = [permutation(epoch, SEED, 50, 0) for epoch in range(3)]
    orders += [permutation(0, SEED + 1, 50, 0), permutation(0, SEED, 50, 1)]
    for order in orders:
        assert sorted(order) == list(range(50))
    assert len({order.tobytes() for order in orders}) == 5


def test_the_order_is_uniform():
    """Record 0 lands on each of four places about as often: 1000 epochs, five standard deviations of room."""
    places = [int(np.argmin(permutation(epoch, SEED, 4, 0))) for epoch in range(1000)]
    assert np.all(np.abs(np.bincount(places) - 250) < 5 * np.sqrt(1000 * 0.25 * 0.75))


def test_the_order_is_the_same_in_every_release():
    """Golden values. A release that changes them gives every resumed run another data order: do not."""
    assert permutation(0, 0, 8, 0).tolist() == [7, 4, 5, 1, 6, 2, 0, 3]
    assert list(islice(make_order([(10, 1.0)], None, B, 0).replacements(3), 5)) == [8, 4, 2, 1, 7]
    assert is_mirrored(np.arange(8), 0).tolist() == [True, True, False, False, False, True, False, True]
    assert crop_place(3, 0) == (0.6894402973474989, 0.8265378411916671)
    assert (caption_words(np.arange(5), 0) % np.uint64(5)).tolist() == [2, 2, 4, 0, 3]
    bucket = np.array([0, 0, 1, 1, 1, 0, 1, 1, 2, 2])
    mixed = make_order([(6, 0.7), (4, 0.3)], bucket, 3, 0)
    assert [mixed.bucket(step) for step in range(12)] == [1, 0, 0, 1, 1, 1, 2, 0, 1, 0, 1, 2]
    assert mixed.indices(np.arange(12)).tolist() == [4, 7, 2, 1, 5, 0, 5, 1, 0, 3, 6, 2]


def test_positions_are_a_permutation_of_their_epoch():
    n = 10
    k = np.arange(35).reshape(5, 7)
    index = plain(n).indices(k)
    assert index.shape == k.shape
    for position, found in zip(k.ravel(), index.ravel(), strict=True):
        assert found == permutation(position // n, SEED, n, 0)[position % n]
        assert found == plain(n).indices(np.array(position))


def test_the_batch_size_only_regroups():
    k = np.arange(100)
    np.testing.assert_array_equal(plain(23, 4).indices(k), plain(23, 6).indices(k))
    weighted = [make_order([(23, 0.2), (5, 0.8)], None, size, SEED).indices(k) for size in (4, 6)]
    np.testing.assert_array_equal(*weighted)


def test_a_run_can_be_longer_than_any_counter_of_32_bits():
    n, far = 10, 2**40
    index = plain(n).indices(far + np.arange(30))
    epoch, j = divmod(far, n)
    assert index[0] == permutation(epoch, SEED, n, 0)[j]
    assert sorted(index[n - j : 2 * n - j]) == list(range(n))


# --- mixtures -----------------------------------------------------------------------------------------------

MIXTURES = [
    ([50_000, 50_000], [0.5, 0.5]),
    ([200_000, 3_000], [0.9, 0.1]),
    ([1, 50_000, 7_000], [1e-5, 3.0, 1.0]),
    ([1, 100_000], [1e-9, 1.0]),  # a part that earns no slot has one
    ([5_000] * 40, np.linspace(1, 2, 40).tolist()),
]


@pytest.mark.parametrize(("sizes", "weights"), MIXTURES, ids=range(5))
def test_parts_have_their_shares_over_any_cycle_and_nearly_over_any_stretch(sizes, weights):
    order = make_order(list(zip(sizes, weights, strict=True)), None, B, SEED)
    share = np.array(weights) / sum(weights)
    edges = np.cumsum([0, *sizes])

    def counts(first, length):
        index = order.indices(np.arange(first, first + length))
        return np.bincount(np.searchsorted(edges, index, side="right") - 1, minlength=len(sizes))

    for first in (0, 12_345, 2**40 + 1):
        found = counts(first, SLOTS)
        assert np.all(found >= 1)
        unearned = (share * SLOTS < 0.5).sum()  # their slots are the largest part's
        off = found - share * SLOTS
        off[np.argmax(share)] += unearned
        assert np.all(np.abs(off) < 1 + 1e-6)
    for first in (0, SLOTS - 500):
        assert np.all(np.abs(counts(first, 1000) - share * 1000) < 3 + 2 * len(sizes) * share)


@pytest.mark.parametrize(
    ("sizes", "weights"), [([100, 100], [0.5, 0.5]), ([3, 1000], [0.4, 0.6]), ([1, 50, 7], [1e-4, 3.0, 1.0])]
)
def test_every_record_of_a_part_comes_once_per_epoch_of_that_part(sizes, weights):
    order = make_order(list(zip(sizes, weights, strict=True)), None, B, SEED)
    index = order.indices(np.arange(10_000))
    start = 0
    for n in sizes:
        of_part = index[(index >= start) & (index < start + n)]
        for epoch in range(len(of_part) // n):
            assert sorted(of_part[epoch * n : (epoch + 1) * n]) == list(range(start, start + n))
        assert len(set(of_part[len(of_part) // n * n :])) == len(of_part) % n
        start += n


def test_parts_of_one_size_have_orders_of_their_own():
    index = make_order([(50, 1.0), (50, 1.0)], None, B, SEED).indices(np.arange(100))
    assert index[index < 50].tolist() != (index[index >= 50] - 50).tolist()


def test_a_source_without_records_is_refused():
    with pytest.raises(DataError, match="source 2 of 2 .*holds no records"):
        make_order([(5, 1.0), (0, 1.0)], None, B, SEED)


# --- buckets ------------------------------------------------------------------------------------------------


def some_buckets(n):
    """Nine buckets: one has half of the records, one has none, one has a single record."""
    bucket = np.random.default_rng(0).choice([0, 1, 2, 3, 4, 6, 7], n, p=[0.5, 0.2, 0.1, 0.1, 0.05, 0.03, 0.02])
    bucket[n // 2] = 8
    return bucket.astype(np.uint8)


def test_a_batch_has_one_bucket_only():
    bucket = some_buckets(500)
    order = make_order([(300, 0.9), (200, 0.1)], bucket, B, SEED)
    assert order.used == (0, 1, 2, 3, 4, 6, 7, 8)
    for step in range(200):
        index = order.indices(np.arange(step * B, (step + 1) * B))
        assert set(bucket[index]) == {order.bucket(step)}


def test_buckets_and_sources_are_cells_with_their_shares():
    """A record of source s comes with the weight w_s / n_s, whatever its bucket."""
    sizes, weights = [600, 400], [3.0, 1.0]
    bucket, size = some_buckets(1000), 16
    order = make_order(list(zip(sizes, weights, strict=True)), bucket, size, SEED)
    steps = 20_000
    index = order.indices(np.arange(steps * size))
    expected = np.repeat(np.array(weights) / sizes / sum(weights), sizes) * steps * size
    for b in order.used:
        for source in (slice(0, 600), slice(600, 1000)):
            cell = np.flatnonzero(bucket[source] == b) + source.start
            found = np.isin(index, cell).sum()
            # a step more or less of its bucket, and the rounding of a plan
            assert abs(found - expected[cell].sum()) < 3 * size + 3
    for b in order.used:  # of a cell, every record as often as another
        for source in (slice(0, 600), slice(600, 1000)):
            cell = np.flatnonzero(bucket[source] == b) + source.start
            times = np.bincount(index, minlength=1000)[cell]
            assert len(cell) == 0 or times.max() - times.min() <= 1


def test_a_record_alone_in_its_bucket_comes_as_one_of_a_million_would():
    n = 2**21
    bucket = np.zeros(n, np.uint8)
    bucket[12] = 1
    order = make_order([(n, 1.0)], bucket, 1, SEED)
    rare = [order.indices(np.arange(first, first + SLOTS)) == 12 for first in (0, SLOTS)]
    assert [found.sum() for found in rare] == [1, 1]  # one batch in a cycle


def test_starting_anywhere_equals_getting_there():
    order = make_order([(300, 0.9), (200, 0.1)], some_buckets(500), B, SEED)
    whole = order.indices(np.arange(4000))
    again = pickle.loads(pickle.dumps(order))  # as a worker process gets it
    for first in (3999, 1234, 17, 0):  # backwards: nothing is remembered that matters
        np.testing.assert_array_equal(again.indices(np.arange(first, 4000)), whole[first:])
    np.testing.assert_array_equal(order.indices(np.arange(4000)[::-1]), whole[::-1])


# --- replacements -------------------------------------------------------------------------------------------


def test_replacements_are_spread_over_the_other_records():
    others = [next(plain(6).replacements(4)) for _ in range(2)]
    assert others[0] == others[1]  # of the index alone
    drawn = list(plain(6).replacements(4))
    assert set(drawn) == {0, 1, 2, 3, 5}
    first = [next(plain(10_000).replacements(i)) for i in range(100)]
    assert len(set(first)) > 90


def test_replacements_come_from_the_cell_then_the_bucket_then_anywhere():
    bucket = np.array([0] * 5 + [1] * 5 + [0] * 5)
    order = make_order([(10, 1.0), (5, 1.0)], bucket, B, SEED)
    tried = list(order.replacements(3))
    assert [set(tried[i : i + 100]) for i in (0, 100, 200)] == [{0, 1, 2, 4}, set(range(10, 15)), set(range(5, 10))]
    alone = make_order([(1, 1.0), (4, 1.0)], None, B, SEED)
    assert set(alone.replacements(0)) == {1, 2, 3, 4}


def test_stand_ins_are_the_first_replacements_that_are_good():
    order = plain(40)
    bad = np.zeros(40, bool)
    bad[[3, 4, 17]] = True
    used = order.stand_ins(bad)
    good = ~bad
    np.testing.assert_array_equal(used[good], np.flatnonzero(good))
    for index in (3, 4, 17):
        assert used[index] == next(other for other in order.replacements(index) if good[other])


def test_stand_ins_have_the_same_shape():
    bucket = np.array([0] * 6 + [1] * 2)
    order = make_order([(6, 1.0), (2, 1.0)], bucket, B, SEED)
    bad = np.isin(np.arange(8), [6, 7])
    with pytest.raises(DataError, match=r"record 6 .*no usable record of its shape"):
        order.stand_ins(bad)
    left = order.without(bad)
    assert left.used == (0,)
    assert set(left.indices(np.arange(100))) == set(range(6))
    np.testing.assert_array_equal(left.stand_ins(bad), np.arange(8))
    with pytest.raises(DataError, match="all 8 records are bad"):
        order.without(np.ones(8, bool))


def test_a_part_that_is_all_bad_takes_others_of_its_bucket():
    order = make_order([(6, 1.0), (1, 1.0)], None, B, SEED)
    assert order.stand_ins(np.arange(7) == 6)[6] in range(6)


# --- random words -------------------------------------------------------------------------------------------


def test_words_are_random_access():
    stream = random_words(200, SEED, Purpose.CAPTION)
    for k in (np.arange(200), np.arange(50, 90), np.array([7, 8, 9, 3, 199, 4, 4]), np.array([], np.int64)):
        np.testing.assert_array_equal(words_at(k, SEED, Purpose.CAPTION), stream[k])
    far = 2**50 + np.arange(3)
    np.testing.assert_array_equal(words_at(far, SEED, Purpose.CAPTION)[1:], words_at(far[1:], SEED, Purpose.CAPTION))


def test_half_of_the_samples_are_mirrored_anew_in_every_epoch():
    flags = is_mirrored(np.arange(1000), SEED)
    assert flags.dtype == bool and 0.42 < flags.mean() < 0.58
    assert not np.array_equal(flags[:500], flags[500:])


def test_captions_are_drawn_evenly_and_apart_from_flips():
    k = np.arange(3000)
    number = caption_words(k, SEED) % np.uint64(3)
    assert np.bincount(number).min() > 900
    assert abs(np.corrcoef(number == 0, is_mirrored(k, SEED))[0, 1]) < 0.1


def test_crop_places_fill_the_square():
    places = np.array([crop_place(k, SEED) for k in range(500)])
    assert places.min() >= 0 and places.max() < 1
    assert np.all(np.histogram2d(*places.T, bins=4, range=[[0, 1], [0, 1]])[0] > 10)
    assert abs(np.corrcoef(places.T)[0, 1]) < 0.2


# --- speed --------------------------------------------------------------------------------------------------


def test_a_batch_of_a_million_records_is_found_at_once():
    order = make_order([(10**6, 1.0)], None, 256, SEED)
    order.indices(np.arange(256))
    seconds = []
    for step in range(1, 50):
        begin = time.perf_counter()
        order.indices(np.arange(step * 256, (step + 1) * 256))
        seconds.append(time.perf_counter() - begin)
    assert np.median(seconds) < 1e-3
