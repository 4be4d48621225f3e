"""The samplers walk where diffusers' schedulers walk, given the same network and the same noise.

Each case of ``tools/make_golden_diffusion.py`` is compared with its recording, and live where diffusers is there.
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import samplers
from dit_jax.diffusion.guidance import conditional
from dit_jax.diffusion.process import Process
from dit_jax.diffusion.schedules import make_schedule
from tools import make_golden_diffusion as reference

TOLERANCE = 1e-4
each_case = pytest.mark.parametrize("case", reference.CASES, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def golden():
    with np.load(reference.GOLDEN) as file:
        return dict(file)


@functools.cache
def walker(case):
    """Our sampler, compiled: (x_start, noise of every step, grid) -> the states on the grid."""
    grid = np.load(reference.GOLDEN)[f"{case.name}/grid"]
    process = Process(make_schedule(case.schedule, case.shift), case.prediction)
    denoise = conditional(lambda x_t, t, text: reference.network(case, x_t, t, jnp), process, None)
    if case.sampler == "ddim":
        sampler = samplers.ddim(process, grid, case.eta)
    else:
        sampler = getattr(samplers, case.sampler)(process, grid)

    def walk(x, noise, grid):
        def body(carry, now):
            z, t, t_next = now
            carry = sampler.step(denoise, z, carry[0], t, t_next, carry[1])
            return carry, carry[0]

        _, states = jax.lax.scan(body, (x, sampler.init(x)), (noise, grid[:-1], grid[1:]))
        return jnp.concatenate([x[None], states])

    # The recorded noise takes the place of the keys.
    with mock.patch.object(samplers, "normal_per_sample", lambda noise, shape: noise):
        return jax.jit(walk).lower(*reference.start_and_noise(), grid).compile()


def assert_same_walk(ours, theirs):
    for k, (a, b) in enumerate(zip(np.asarray(ours), theirs, strict=True)):
        error = np.max(np.abs(a - b)) / np.max(np.abs(b))
        assert error <= TOLERANCE, f"state {k} differs by {error:.1e}"


@each_case
def test_sampler_walks_where_diffusers_was_recorded(case, golden):
    ours = walker(case)(golden["x_start"], golden["noise"], golden[f"{case.name}/grid"])
    assert_same_walk(ours, golden[f"{case.name}/states"])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers
@each_case
def test_sampler_walks_where_diffusers_walks(case):
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    grid, states = reference.trajectory(case)
    assert_same_walk(walker(case)(*reference.start_and_noise(), grid), states)
