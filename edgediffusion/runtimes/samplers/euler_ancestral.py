"""Euler's method with ancestral noise, from k-diffusion (``sample_euler_ancestral``): DDPM's step in Karras' state."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.samplers import Denoise
from edgediffusion.runtimes.schedules import Points, interpolated, require_kind

ORDER = 0.0


def points(schedule: NoiseSchedule, steps: int) -> Points:
    require_kind(schedule, "euler-ancestral", is_flow=False)
    return interpolated(schedule, steps)


def sample(denoise: Denoise, x: np.ndarray, points: Points, noise: Noise) -> Iterator[np.ndarray]:
    """A step goes down to s_down without noise, then up to s' by noise of variance s_up^2; s = sigma / alpha."""
    for i, (at, to) in enumerate(points):
        x0 = denoise(x, i)
        s, s_next = at.sigma / at.alpha, to.sigma / to.alpha
        s_up = math.sqrt(s_next**2 * (s**2 - s_next**2) / s**2)
        s_down = math.sqrt(s_next**2 - s_up**2)
        epsilon = (x - at.alpha * x0) / at.sigma
        x = to.alpha * (x0 + s_down * epsilon + s_up * noise.normal(x.shape))
        yield x
