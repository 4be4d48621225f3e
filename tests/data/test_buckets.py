"""Shapes of about one area for pictures of every aspect ratio."""

import threading
import time

import numpy as np
import pytest

from dit_jax.data.buckets import WIDEST, assign, shapes, sizes_of
from dit_jax.data.sources.records import BadRecord
from dit_jax.errors import DataError

CASES = [
    (256, 16, 9),
    (256, 16, 4),
    (256, 8, 15),
    (512, 16, 9),
    (1024, 32, 9),
    (1024, 16, 255),
    (64, 16, 9),
    (64, 8, 5),
]


@pytest.mark.parametrize(("size", "unit", "limit"), CASES)
def test_shapes_are_symmetric_have_one_area_and_hold_the_square(size, unit, limit):
    found = shapes(size, unit, limit)
    assert len(set(found)) == len(found) <= limit
    assert (size, size) in found
    assert {(width, height) for height, width in found} == set(found)
    for height, width in found:
        assert height % unit == width % unit == 0
        assert max(height, width) <= WIDEST * min(height, width)
        # the longer side is off by half a unit at most
        assert abs(height * width - size**2) <= min(height, width) * unit / 2
    ratios = [width / height for height, width in found]
    assert ratios == sorted(ratios)


def test_the_shapes_of_256_pixels():
    wide = [(240, 272), (224, 288), (208, 320), (192, 336)]
    assert shapes(256, 16, 9) == (*[(w, h) for h, w in reversed(wide)], (256, 256), *wide)


def test_more_shapes_reach_from_the_square_to_the_widest():
    for limit in (3, 5, 7, 9):
        found = shapes(1024, 16, limit)
        ratios = np.log([width / height for height, width in found])
        assert len(found) == limit
        assert ratios[-1] > 0.95 * np.log(WIDEST)
        steps = np.diff(ratios)
        assert steps.max() < 1.5 * steps.min()


@pytest.mark.parametrize("limit", [1, 2])
def test_where_there_is_no_room_for_two_there_is_the_square(limit):
    assert shapes(256, 16, limit) == ((256, 256),)


def test_every_picture_goes_to_the_nearest_shape():
    choice = shapes(256, 16, 9)
    sizes = np.random.default_rng(0).integers(1, 3000, (500, 2))
    found = assign(sizes, choice)
    assert found.dtype == np.uint8
    for (height, width), bucket in zip(sizes, found, strict=True):
        distances = [abs(np.log(width / height) - np.log(w / h)) for h, w in choice]
        assert distances[bucket] == pytest.approx(min(distances))
    # a shape takes its own pictures, at any scale, and turned pictures go to the turned shape
    np.testing.assert_array_equal(assign(np.array(choice) * 7, choice), range(9))
    uneven = sizes[sizes[:, 0] != sizes[:, 1]]
    np.testing.assert_array_equal(assign(uneven[:, ::-1], choice), 8 - assign(uneven, choice))


def test_what_cannot_be_read_counts_as_a_square():
    choice = shapes(256, 16, 9)
    assert choice[assign(np.zeros((1, 2), np.int32), choice)[0]] == (256, 256)
    assert assign(np.zeros((0, 2), np.int32), choice).shape == (0,)


class Sized:
    """A source of which only the sizes are asked: picture i is i + 2 pixels high; every seventh is bad."""

    name = "sized"

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def size(self, index):
        time.sleep(1e-5)  # gives way to the other threads
        if index % 7 == 0:
            raise BadRecord(str(index), "on purpose")
        return index + 2, 10


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("count", [0, 5, 1000])
def test_sizes_are_read_by_threads(count, threads):
    rows = np.arange(count)
    expected = np.where((rows % 7 == 0)[:, None], 0, np.stack([rows + 2, np.full_like(rows, 10)], axis=1))
    found = sizes_of(Sized(count), threads, 60)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected)


def test_a_size_that_never_comes_ends_in_one_error():
    released = threading.Event()

    class Silent(Sized):
        def size(self, index):
            if index == 700:
                released.wait()
            return super().size(index)

    with pytest.raises(DataError, match=r"^reading sizes of sized: nothing came for 0\.5 seconds.*data\.patience"):
        sizes_of(Silent(1000), 2, 0.5)
    released.set()
