"""Heun's method on the probability-flow ODE: Karras et al. 2022 (2206.00364), algorithm 1. Two calls a step, one in the last."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.samplers import Denoise, _two_calls
from edgediffusion.runtimes.schedules import Points, interpolated, require_kind

ORDER = 2.0
KIND = "diffusion"


def points(schedule: NoiseSchedule, steps: int) -> Points:
    """``steps`` of them make 2 steps - 1 calls; Euler's points."""
    require_kind(schedule, "heun", is_flow=False)
    nodes = interpolated(schedule, steps)
    return _two_calls.ends(nodes.at, noise_scale=nodes.noise_scale)


def sample(denoise: Denoise, x: np.ndarray, points: Points, noise: Noise) -> Iterator[np.ndarray]:
    """d is the derivative of the paper's state y = x / alpha by its s = sigma / alpha, which is the estimate of the noise.

    y + (s' - s) d = x_0 + s' d: a step begins as DDIM's. Half of what d has changed by the end of it is added then.
    """
    for i in range(0, len(points), 2):
        at, to = points.at[i], points.to[i]
        x0 = denoise(x, i)
        d = (x - at.alpha * x0) / at.sigma
        ddim = to.alpha * x0 + to.sigma * d
        x = ddim.copy()
        yield x
        if i + 1 == len(points):
            return
        change = (x - to.alpha * denoise(x, i + 1)) / to.sigma - d
        x = ddim + (0.5 * to.alpha * (to.ratio - at.ratio)) * change
        yield x
