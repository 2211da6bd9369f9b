"""Heun's method on a rectified flow: Esser et al. 2024 (2403.03206). Two calls a step, one in the last."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.samplers import Denoise, _two_calls, flow_euler
from edgediffusion.runtimes.schedules import Points, require_kind

ORDER = 2.0
KIND = "flow"


def points(schedule: NoiseSchedule, steps: int) -> Points:
    """``steps`` of them make 2 steps - 1 calls; Euler's points."""
    require_kind(schedule, "flow-heun", is_flow=True)
    return _two_calls.ends(flow_euler.points(schedule, steps).at)


def sample(denoise: Denoise, x: np.ndarray, points: Points, noise: Noise) -> Iterator[np.ndarray]:
    """v = noise - x_0 = (x - x_0) / sigma is the derivative of x by sigma."""
    for i in range(0, len(points), 2):
        at, to = points.at[i], points.to[i]
        v = (x - denoise(x, i)) / at.sigma
        start, x = x, x + (to.sigma - at.sigma) * v
        yield x
        if i + 1 == len(points):
            return
        v = 0.5 * (v + (x - denoise(x, i + 1)) / to.sigma)
        x = start + (to.sigma - at.sigma) * v
        yield x
