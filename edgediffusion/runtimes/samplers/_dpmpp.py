"""One step of multistep DPM-Solver++, deterministic (Lu et al. 2022, 2211.01095) and stochastic, as diffusers has them.

In the papers' letters: lambda = log(alpha / sigma), h is the step in it, m an estimate of x_0, D0, D1 and D2 what is known of
its derivatives. With a = 1 for the ODE and a = 2 for the SDE, which adds noise z, a step is

    x' = (sigma' / sigma) e^{-(a - 1) h} x + alpha' (B0 D0 + B1 D1 + B2 D2) + sigma' sqrt(1 - e^{-2 h}) z,    B0 = 1 - e^{-a h}
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.samplers import Denoise
from edgediffusion.runtimes.schedules import Point, Points

FEW = 15  # steps, below which the last but one is of a lower order as well
KINDS = ("midpoint", "heun")


@dataclass
class _Past:
    """The last estimates of x_0 and the lambdas that they were made at, the newest first."""

    m: deque[np.ndarray] = field(default_factory=lambda: deque(maxlen=3))
    lambdas: deque[float] = field(default_factory=lambda: deque(maxlen=3))

    def add(self, m: np.ndarray, at: Point) -> None:
        self.m.appendleft(m)
        self.lambdas.appendleft(at.half_log_snr)


def sample(denoise: Denoise, x: np.ndarray, points: Points, noise: Noise | None, *, order: int, kind: str) -> Iterator[np.ndarray]:
    """``order`` 1 to 3, without ``noise`` for the ODE.

    ``kind`` says how a step of second order weighs D1: the integral of the exponential for ``heun``, B0 / 2 otherwise. In a
    step of third order ``diffusers`` stands for its B2, which is off by one.
    """
    past, total = _Past(), len(points)
    for i, (at, to) in enumerate(points):
        past.add(denoise(x, i), at)
        # The step to no noise at all is infinite in lambda: it must be of first order.
        left = 1 if i == total - 1 else 2 if i == total - 2 and total < FEW else order
        h = to.half_log_snr - at.half_log_snr
        drift = _drift(past, h, min(order, i + 1, left), 1 if noise is None else 2, kind)
        if noise is None:
            x = (to.sigma / at.sigma) * x + to.alpha * drift
        else:
            scale, s = (to.sigma / at.sigma) * math.exp(-h), to.sigma * math.sqrt(-math.expm1(-2.0 * h))
            x = scale * x + to.alpha * drift + s * noise.normal(x.shape)
        yield x


def noise_terms(at: Point, to: Point) -> tuple[float, float]:
    """Of a step of first order: an error of epsilon of one moves x_0 by -sigma / alpha, and so x by alpha' B0 times that."""
    h = to.half_log_snr - at.half_log_snr
    return to.sigma * math.sqrt(-math.expm1(-2.0 * h)), to.alpha * math.expm1(-2.0 * h) * at.ratio


def _drift(past: _Past, h: float, order: int, a: int, kind: str) -> np.ndarray:
    m, b0 = past.m, -math.expm1(-a * h)
    drift: np.ndarray = b0 * m[0]
    if order == 1:
        return drift
    d10 = (h / (past.lambdas[0] - past.lambdas[1])) * (m[0] - m[1])
    b1 = 1.0 - b0 / (a * h)
    if order == 2:
        drift += (b1 if kind == "heun" else 0.5 * b0) * d10
        return drift
    r0, r1 = ((past.lambdas[i] - past.lambdas[i + 1]) / h for i in (0, 1))
    d11 = (m[1] - m[2]) / r1
    d1, d2 = d10 + (r0 / (r0 + r1)) * (d10 - d11), (d10 - d11) / (r0 + r1)
    b2 = 0.5 - (a * h - b0) / (a * h) ** 2
    drift += b1 * d1 + (b2 - 1.0 if kind == "diffusers" else b2) * d2
    return drift
