"""A mixture of Gaussians on the line: data whose denoiser is known, to measure samplers by.

Seen through noise, x_t = alpha x0 + sigma epsilon, component j of weight w_j, mean m_j and deviation s_j is a Gaussian
of variance alpha^2 s_j^2 + sigma^2. By Bayes

    p_j ~ w_j N(x_t; alpha m_j, alpha^2 s_j^2 + sigma^2)
    E[x0 | x_t] = sum_j p_j (m_j + alpha s_j^2 / (alpha^2 s_j^2 + sigma^2) (x_t - alpha m_j))           (1)
"""

from types import ModuleType

import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm

from dit_jax.arrays import Array
from dit_jax.diffusion.process import Denoise, Process, Targets

# Weight, mean and standard deviation of each component.
COMPONENTS = np.array([[0.3, -1.5, 0.4], [0.5, 0.2, 0.3], [0.2, 1.8, 0.5]])


def expected_x0(xp: ModuleType, x: Array, alpha: Array | float, sigma: Array | float) -> Array:
    """Equation (1), elementwise; ``xp`` is numpy or jax.numpy."""
    logits, means = [], []
    for weight, mean, std in COMPONENTS:
        variance = alpha**2 * std**2 + sigma**2
        logits.append(np.log(weight) - (x - alpha * mean) ** 2 / (2 * variance) - 0.5 * xp.log(variance))
        means.append(mean + alpha * std**2 / variance * (x - alpha * mean))
    logits, means = xp.stack(logits), xp.stack(means)
    share = xp.exp(logits - logits.max(0, keepdims=True))
    return (share * means).sum(0) / share.sum(0)


def make_denoise(process: Process) -> Denoise:
    """What a perfect network would answer, every element of ``[B, h, w, C]`` a draw of its own."""

    def denoise(x_t: Array, t: Array) -> Targets:
        column = t[:, None, None, None]
        alpha, sigma = process.schedule.alpha(column), process.schedule.sigma(column)
        return process.from_x0(expected_x0(jnp, x_t, alpha, sigma), x_t, t)

    return denoise


def quantiles(levels: np.ndarray) -> np.ndarray:
    """Where the mixture has these shares of its mass below, read from a fine table."""
    x = np.linspace(-6.0, 6.0, 10_001)
    below = sum(weight * np.asarray(norm.cdf(x, mean, std), np.float64) for weight, mean, std in COMPONENTS)
    return np.interp(levels, below, x)
