"""Laws of the grids: where they begin and end, and what spaces them."""

import numpy as np
import pytest

from dit_jax.diffusion.grids import GRIDS, make_grid
from dit_jax.diffusion.schedules import SCHEDULES, make_schedule
from tools import make_golden_diffusion as reference


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", GRIDS)
def test_a_grid_falls_from_noise_to_the_picture(name, schedule, steps):
    if (name, schedule) == ("karras", "rectified_flow"):
        pytest.skip("has no largest noise level")
    grid = make_grid(name, make_schedule(schedule, 1.0), steps, 3.0, 7.0)
    assert grid.dtype == np.float32 and grid.shape == (steps + 1,)
    assert grid[0] == 1 and grid[-1] == 0 and (np.diff(grid) < 0).all()


def test_uniform_is_even_and_moved_by_the_shift_of_rectified_flow():
    even = make_grid("uniform", make_schedule("linear", 1.0), 4, 3.0, 7.0)
    np.testing.assert_array_equal(even, np.array([1, 0.75, 0.5, 0.25, 0], np.float32))
    moved = make_grid("uniform", make_schedule("rectified_flow", 0.5), 8, 3.0, 7.0)
    np.testing.assert_allclose(moved, [0.5 * k / 8 / (1 - 0.5 * k / 8) for k in range(8, -1, -1)], rtol=1e-6)


def test_trailing_takes_the_trained_steps():
    schedule = make_schedule("scaled_linear", 1.0)
    grid = make_grid("trailing", schedule, 7, 3.0, 7.0)
    assert [round(t * 1000) - 1 for t in grid[:-1].tolist()] == [999, 856, 713, 570, 428, 285, 142]
    np.testing.assert_allclose(grid * 1000, np.round(grid * 1000), atol=1e-4)
    with pytest.raises(ValueError, match="1001 steps: a trailing grid has at most 1000"):
        make_grid("trailing", schedule, 1001, 3.0, 7.0)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "edm"])
def test_karras_spaces_the_roots_of_the_noise_level_evenly(name):
    schedule = make_schedule(name, 1.0)
    grid = make_grid("karras", schedule, 12, 3.0, 5.0)[:-1]
    ratio = np.asarray(schedule.sigma(grid), np.float64) / np.asarray(schedule.alpha(grid))
    roots = ratio ** (1 / 5)
    np.testing.assert_allclose(np.diff(roots), (roots[-1] - roots[0]) / 11, rtol=2e-3)
    least = 0.002 if name == "edm" else schedule.ratio[1]
    np.testing.assert_allclose(ratio[-1], least, rtol=1e-4)


def test_shifted_multiplies_the_noise_level_of_rectified_flow():
    schedule = make_schedule("rectified_flow", 1.0)
    grids = [make_grid("shifted", schedule, 10, shift, 7.0)[1:-1] for shift in (1.0, 4.0)]
    even, moved = (grid / (1 - grid) for grid in grids)
    np.testing.assert_allclose(moved, 4 * even, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "schedule", "shift", "rho", "said"),
    [
        ("cubic", "linear", 3.0, 7.0, "unknown grid 'cubic'; choose one of uniform, trailing, shifted, karras"),
        ("karras", "rectified_flow", 3.0, 7.0, "pure noise at t = 1"),
        ("karras", "edm", 3.0, 0.0, "rho of a karras grid must be above 0, not 0.0"),
        ("shifted", "linear", -1.0, 7.0, "the shift of a grid must be above 0, not -1.0"),
    ],
)
def test_what_cannot_be_is_refused(name, schedule, shift, rho, said):
    with pytest.raises(ValueError, match=said):
        make_grid(name, make_schedule(schedule, 1.0), 10, shift, rho)


def test_karras_and_trailing_are_those_of_diffusers():
    with np.load(reference.GOLDEN) as golden:
        karras = golden["dpmpp_2m-scaled_linear-v-eta0-karras/grid"]
        trailing = golden["dpmpp_2m-linear-x0-eta0-trailing/grid"]
    np.testing.assert_allclose(
        make_grid("karras", make_schedule("scaled_linear", 1.0), 10, 3.0, 7.0), karras, rtol=2e-4
    )
    np.testing.assert_allclose(make_grid("trailing", make_schedule("linear", 1.0), 10, 3.0, 7.0), trailing, rtol=1e-6)
