"""Euler's method with ancestral noise, from k-diffusion (``sample_euler_ancestral``): DDPM's step in Karras' state."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.samplers import Denoise
from edgediffusion.runtimes.schedules import Point, Points, interpolated, require_kind

ORDER = 0.0
KIND = "diffusion"


def points(schedule: NoiseSchedule, steps: int) -> Points:
    require_kind(schedule, "euler-ancestral", is_flow=False)
    return interpolated(schedule, steps)


def sample(denoise: Denoise, x: np.ndarray, points: Points, noise: Noise) -> Iterator[np.ndarray]:
    """A step goes down to s_down without noise, then up to s' by noise of variance s_up^2; s = sigma / alpha."""
    for i, (at, to) in enumerate(points):
        x0 = denoise(x, i)
        s_down, s_up = down_up(at, to)
        epsilon = (x - at.alpha * x0) / at.sigma
        x = to.alpha * (x0 + s_down * epsilon + s_up * noise.normal(x.shape))
        yield x


def noise_terms(at: Point, to: Point) -> tuple[float, float]:
    """s = alpha' s_up; x_0 moves by -sigma / alpha for an error of epsilon of one, so c = alpha' (s_down - sigma / alpha).

    Both are those of DDIM with eta = 1 (2010.02502, equation 12) where alpha^2 + sigma^2 = 1.
    """
    s_down, s_up = down_up(at, to)
    return to.alpha * s_up, to.alpha * (s_down - at.sigma / at.alpha)


def down_up(at: Point, to: Point) -> tuple[float, float]:
    """s_down and s_up of a step."""
    s, s_next = at.ratio, to.ratio
    s_up = math.sqrt(s_next**2 * (s**2 - s_next**2) / s**2)
    return math.sqrt(s_next**2 - s_up**2), s_up
