"""DPM-Solver++(2M): Lu et al. 2022 (2211.01095), algorithm 2; the first and the last step are of order one."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.runtimes import schedules
from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.samplers import Denoise
from edgediffusion.runtimes.schedules import Point, Points

ORDER = 2.0
KIND = "both"


def points(schedule: NoiseSchedule, steps: int) -> Points:
    """As diffusers spaces them: unlike for DDIM, leading and linspace divide the range into steps + 1 parts."""
    schedules.check_steps(steps, schedule.train_steps)
    if schedule.kind == "flow":
        return _flow_points(schedule, steps)
    return schedules.multistep(schedule, steps)


def sample(denoise: Denoise, x: np.ndarray, points: Points, noise: Noise) -> Iterator[np.ndarray]:
    """In the paper's letters: m is the estimate of x_0, h the step in lambda = log(alpha / sigma)."""
    m_before, h_before = None, 0.0
    for i, (at, to) in enumerate(points):
        m = denoise(x, i)
        h = _lambda(to) - _lambda(at)
        if m_before is None or i == len(points) - 1:
            d = m
        else:
            r = h_before / h
            d = m + (m - m_before) / (2.0 * r)
        x = (to.sigma / at.sigma) * x - to.alpha * math.expm1(-h) * d
        m_before, h_before = m, h
        yield x


def _lambda(point: Point) -> float:
    return math.log(point.alpha) - math.log(point.sigma) if point.sigma > 0 else math.inf


def _flow_points(schedule: NoiseSchedule, steps: int) -> Points:
    """Starts one training step below pure noise, where lambda is finite; the network is told whole timesteps."""
    sigmas = schedules.shifted(schedule, 1.0 - np.linspace(1.0, 1.0 / schedule.train_steps, steps + 1))
    sigmas = schedules.ramped(schedule, sigmas[::-1][:-1])
    return Points.chain(tuple(Point(1.0 - s, s, float(int(s * schedule.train_steps))) for s in sigmas.tolist()))
