"""DPM-Solver++(2S): Lu et al. 2022 (2211.01095), algorithm 1, with steps as long as their two calls are apart.

As diffusers' ``DPMSolverSinglestepScheduler`` has it, ``steps`` are calls: a step of the method goes from every other point to
the next but one, with the point between for its second call. The last step, and with an even number the one before it, is
of first order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.runtimes import schedules
from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.samplers import Denoise
from edgediffusion.runtimes.schedules import Points

ORDER = 2.0
KIND = "both"


def points(schedule: NoiseSchedule, steps: int) -> Points:
    """Those of ``dpmpp-2m``; diffusers knows linspace and ramps alone for this method."""
    return schedules.multistep(schedule, steps)


def sample(denoise: Denoise, x: np.ndarray, points: Points, noise: Noise) -> Iterator[np.ndarray]:
    """In the paper's letters: m is the estimate of x_0, h the step in lambda = log(alpha / sigma) from where it began."""
    start, begin, m_begin = x, points.at[0], x
    for i, (at, to) in enumerate(points):
        m = denoise(x, i)
        if i % 2 == 0 or i == len(points) - 1:
            start, begin, m_begin = x, at, m
            d = m
        h = to.half_log_snr - begin.half_log_snr
        if begin is not at:
            r = (at.half_log_snr - begin.half_log_snr) / h
            d = m_begin + (m - m_begin) / (2.0 * r)
        x = (to.sigma / begin.sigma) * start - to.alpha * math.expm1(-h) * d
        yield x
