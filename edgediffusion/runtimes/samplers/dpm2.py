"""The midpoint method of k-diffusion (``sample_dpm_2``), inspired by DPM-Solver-2 of Lu et al. 2022 (2206.00927).

Karras et al. 2022 (2206.00364), algorithm 2 without churn, with the second call half way in the logarithm of the noise level.
Two calls a step, one in the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.samplers import Denoise, _two_calls
from edgediffusion.runtimes.schedules import Points, interpolated, require_kind

ORDER = 2.0
KIND = "diffusion"


def points(schedule: NoiseSchedule, steps: int) -> Points:
    """``steps`` of them make 2 steps - 1 calls; Euler's points."""
    require_kind(schedule, "dpm2", is_flow=False)
    nodes = interpolated(schedule, steps)
    return _two_calls.middles(schedule, nodes, [math.sqrt(a.ratio * b.ratio) for a, b in pairwise(nodes.at)])


def sample(denoise: Denoise, x: np.ndarray, points: Points, noise: Noise) -> Iterator[np.ndarray]:
    return _two_calls.midpoint(denoise, x, points, noise, lambda at, to: (to.ratio, 0.0))
