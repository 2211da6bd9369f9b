"""The stochastic sampler of a guided-distilled student: Meng et al. 2023 (2210.03142), algorithm 4.

From t = i/N it goes two steps down without noise, to k = t - 2/N, and one up again with fresh noise, to s = t - 1/N; the last
step goes to the data. A step is one call of the network, as in the deterministic sampler.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.samplers import Denoise
from edgediffusion.runtimes.samplers.guided_distillation import KIND, points
from edgediffusion.runtimes.schedules import Point, Points

__all__ = ["KIND", "ORDER", "points", "sample"]

ORDER = 0.0


def sample(denoise: Denoise, x: np.ndarray, points: Points, noise: Noise) -> Iterator[np.ndarray]:
    for i, (t, s) in enumerate(points):
        x0 = denoise(x, i)
        epsilon = (x - t.alpha * x0) / t.sigma
        if i + 1 == len(points):
            yield s.alpha * x0 + s.sigma * epsilon
            return
        k = points.to[i + 1]
        x = (s.alpha / k.alpha) * (k.alpha * x0 + k.sigma * epsilon) + spread(s, k) * noise.normal(x.shape)
        yield x


def spread(s: Point, k: Point) -> float:
    """sigma_{s|k}, what a state at k lacks in noise at s: its square is (1 - exp(lambda_s - lambda_k)) sigma_s^2."""
    return math.sqrt(s.sigma**2 - (s.alpha / k.alpha * k.sigma) ** 2)
