"""DPM-Solver++(2M): Lu et al. 2022 (2211.01095), algorithm 2; the first and the last step are of order one."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.errors import BundleError
from edgediffusion.runtimes import schedules
from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.samplers import Denoise
from edgediffusion.runtimes.schedules import NEARLY_ZERO, Point, Points, alpha_bars, variance_preserving

ORDER = 2.0


def points(schedule: NoiseSchedule, steps: int) -> Points:
    """As diffusers spaces them: unlike for DDIM, leading and linspace divide the range into steps + 1 parts."""
    schedules.check_steps(steps, schedule.train_steps)
    if schedule.kind == "flow":
        return _flow_points(schedule, steps)
    bars = alpha_bars(schedule, end=NEARLY_ZERO)
    timesteps = schedules.check_timesteps(_timesteps(schedule, steps), schedule.train_steps)
    return Points.chain(tuple(variance_preserving(bars, int(t)) for t in timesteps))


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


def _timesteps(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    total = schedule.train_steps
    if schedule.spacing == "linspace":
        return np.linspace(0, total - 1, steps + 1).round()[::-1][:-1]
    if schedule.spacing == "leading":
        return np.arange(1, steps + 1)[::-1] * float(total // (steps + 1)) + schedule.steps_offset
    if schedule.spacing == "trailing":
        return np.round(total - np.arange(steps) * (total / steps)) - 1
    raise BundleError("The bundle's schedule has an unknown spacing", got=schedule.spacing, allowed=", ".join(schedules.SPACINGS))


def _flow_points(schedule: NoiseSchedule, steps: int) -> Points:
    """Starts one training step below pure noise, where lambda is finite; the network is told whole timesteps."""
    sigmas = schedules.shifted(schedule, 1.0 - np.linspace(1.0, 1.0 / schedule.train_steps, steps + 1))
    return Points.chain(tuple(Point(1.0 - s, s, float(int(s * schedule.train_steps))) for s in sigmas[::-1][:-1].tolist()))
