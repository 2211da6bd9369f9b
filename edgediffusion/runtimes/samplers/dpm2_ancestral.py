"""The midpoint method of k-diffusion with ancestral noise (``sample_dpm_2_ancestral``). Two calls a step, one in the last."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.samplers import Denoise, _two_calls
from edgediffusion.runtimes.samplers.euler_ancestral import down_up
from edgediffusion.runtimes.schedules import Points, interpolated, require_kind

ORDER = 0.0
KIND = "diffusion"


def points(schedule: NoiseSchedule, steps: int) -> Points:
    """``steps`` of them make 2 steps - 1 calls. The second lies half way, in log level, to where the noise is added."""
    require_kind(schedule, "dpm2-ancestral", is_flow=False)
    nodes = interpolated(schedule, steps)
    return _two_calls.middles(schedule, nodes, [math.sqrt(a.ratio * down_up(a, b)[0]) for a, b in pairwise(nodes.at)])


def sample(denoise: Denoise, x: np.ndarray, points: Points, noise: Noise) -> Iterator[np.ndarray]:
    return _two_calls.midpoint(denoise, x, points, noise, down_up)
