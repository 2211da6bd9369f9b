"""The linear multistep method of k-diffusion (``sample_lms``): Adams and Bashforth's rule on steps of any size.

The derivative by s = sigma / alpha, which is the estimate of the noise, is taken for the polynomial through its last four
values. Source: Katherine Crowson's LMSDiscreteScheduler; Hairer, Norsett and Wanner, section III.5.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.samplers import Denoise
from edgediffusion.runtimes.schedules import Points, interpolated, require_kind

ORDER = 2.0  # that of its first step, which has no past
KIND = "diffusion"
VALUES = 4


def points(schedule: NoiseSchedule, steps: int) -> Points:
    """Those of Euler's method."""
    require_kind(schedule, "lms", is_flow=False)
    return interpolated(schedule, steps)


def sample(denoise: Denoise, x: np.ndarray, points: Points, noise: Noise) -> Iterator[np.ndarray]:
    past: deque[tuple[float, np.ndarray]] = deque(maxlen=VALUES)  # s and the derivative there, the newest first
    for i, (at, to) in enumerate(points):
        x0 = denoise(x, i)
        d = (x - at.alpha * x0) / at.sigma
        past.appendleft((at.ratio, d))
        weights = _weights([s for s, _ in past], to.ratio)
        # The weights have the sum s' - s: a step is DDIM's, and what the earlier derivatives add to it.
        added = sum(to.alpha * w * (earlier - d) for w, (_, earlier) in zip(weights[1:], list(past)[1:], strict=True))
        x = to.alpha * x0 + to.sigma * d + added
        yield x


def _weights(nodes: Sequence[float], end: float) -> list[float]:
    """Of each Lagrange polynomial of the nodes, the integral from the first to ``end``: Simpson's rule is exact up to cubics."""

    def basis(k: int, s: float) -> float:
        return float(np.prod([(s - other) / (nodes[k] - other) for j, other in enumerate(nodes) if j != k]))

    start = nodes[0]
    middle, sixth = (start + end) / 2, (end - start) / 6
    return [sixth * (basis(k, start) + 4 * basis(k, middle) + basis(k, end)) for k in range(len(nodes))]
