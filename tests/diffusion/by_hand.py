"""The schedules in float64, from their definitions."""

import numpy as np

from dit_jax.diffusion.schedules import make_schedule


def coefficients_by_hand(name, t):
    """alpha, sigma and their derivatives at scalar t, in float64, from the angle or the line."""
    if name == "rectified_flow":
        return 1 - t, t, -1.0, 1.0
    if name == "edm":
        if t == 0:
            return 1.0, 0.0, 0.0, 0.002 * np.log(80 / 0.002)
        span = np.log(80 / 0.002)
        r = 0.002 * np.exp(span * t)
        return (
            1 / np.hypot(1, r),
            r / np.hypot(1, r),
            -r * span * r / np.hypot(1, r) ** 3,
            span * r / np.hypot(1, r) ** 3,
        )
    ratio = make_schedule(name, 1.0).ratio
    k = min(int(np.floor(t * 1000)), 999)
    slope = 1000 * (ratio[k + 1] - ratio[k])
    r = ratio[k] + (t - k / 1000) * slope
    angle = np.arctan(r)  # alpha = cos, sigma = sin
    return np.cos(angle), np.sin(angle), -np.sin(angle) * slope / (1 + r * r), np.cos(angle) * slope / (1 + r * r)
