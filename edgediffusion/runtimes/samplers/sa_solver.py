"""SA-Solver, predicting x_0: Xue et al. 2023 (2309.05019), algorithm 1: a stochastic Adams method with a corrector.

The SDE of equation 6 has a strength tau of the noise: 0 is the ODE, 1 the reverse SDE. With c = 1 + tau^2, h the step in
lambda = log(alpha / sigma) and z the step's noise, which predictor and corrector share, a step is (equations 14 and 17)

    x' = (sigma' / sigma) e^{-tau^2 h} x + c alpha' sum_k b_k m_k + sigma' sqrt(1 - e^{-2 tau^2 h}) z

where b_k is the integral of e^{c (lambda - lambda')} times the k-th Lagrange polynomial of the lambdas of the estimates m.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.runtimes import schedules
from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.options import check_choice, check_range
from edgediffusion.runtimes.samplers import Denoise
from edgediffusion.runtimes.schedules import Point, Points

ORDER = 0.0
KIND = "both"


@dataclass(frozen=True)
class Options:
    """Orders of predictor and corrector, and tau for training timesteps from ``low`` to ``high``; elsewhere tau is 0."""

    predictor: int = 2
    corrector: int = 2
    tau: float = 1.0
    low: float = 200.0
    high: float = 800.0

    def __post_init__(self) -> None:
        check_choice("predictor", self.predictor, (1, 2, 3))
        check_choice("corrector", self.corrector, (1, 2, 3))
        check_range("tau", self.tau, 0.0, 2.0)

    def strength(self, at: Point) -> float:
        return self.tau if self.low <= at.timestep <= self.high else 0.0


def points(schedule: NoiseSchedule, steps: int, options: Options = Options()) -> Points:
    """Those of ``deis``."""
    return schedules.ending_at_first_timestep(schedules.multistep(schedule, steps), schedule)


def sample(denoise: Denoise, x: np.ndarray, points: Points, noise: Noise, options: Options = Options()) -> Iterator[np.ndarray]:
    past: deque[tuple[Point, np.ndarray]] = deque(maxlen=max(options.predictor, options.corrector - 1))  # the newest first
    before, z, last = x, x, points.at[0]
    for i, (at, to) in enumerate(points):
        m = denoise(x, i)
        if i > 0:
            known = [(at, m), *past][: min(options.corrector, i + 1)]
            x = _moved(before, last, at, known, options.strength(last), z)
        past.appendleft((at, m))
        z, before, last = noise.normal(x.shape), x, at
        known = list(past)[: min(options.predictor, i + 1, len(points) - i)]
        x = _moved(x, at, to, known, options.strength(at), z)
        yield x


def noise_terms(at: Point, to: Point, options: Options = Options()) -> tuple[float, float]:
    """Of a predictor of first order: an error of epsilon of one moves x_0 by -sigma / alpha."""
    tau = options.strength(at)
    h = to.half_log_snr - at.half_log_snr
    return _deviation(to, tau, h), to.alpha * math.expm1(-(1 + tau**2) * h) * at.ratio


def _moved(x: np.ndarray, at: Point, to: Point, known: list[tuple[Point, np.ndarray]], tau: float, z: np.ndarray) -> np.ndarray:
    """From ``at`` to ``to`` with the estimates ``known``, the newest first; a corrector's newest is that at ``to``."""
    c, h = 1.0 + tau**2, to.half_log_snr - at.half_log_snr
    x = (to.sigma / at.sigma) * math.exp(-(tau**2) * h if tau else 0.0) * x
    if len(known) == 1:
        return x - (to.alpha * math.expm1(-c * h)) * known[0][1] + _deviation(to, tau, h) * z
    for weight, (_, m) in zip(_weights([p.half_log_snr for p, _ in known], at, to, c), known, strict=True):
        x = x + (c * to.alpha * weight) * m
    return x + _deviation(to, tau, h) * z


def _deviation(to: Point, tau: float, h: float) -> float:
    return to.sigma * math.sqrt(-math.expm1(-2.0 * tau**2 * h)) if tau else 0.0


def _weights(lambdas: list[float], at: Point, to: Point, c: float) -> list[float]:
    """b_k. For two estimates the authors replace the integral of (lambda - lambda_s) e^{c (lambda - lambda')} by h^2 / 2."""
    start, end = at.half_log_snr, to.half_log_snr
    h = end - start
    if len(lambdas) == 2:
        whole, slope = -math.expm1(-c * h) / c, 0.5 * h * h / (lambdas[0] - lambdas[1])
        pivot = 1 if lambdas[0] == end else 0  # the estimate at the beginning of the step
        return [whole * (pivot == 0) + slope, whole * (pivot == 1) - slope]
    found = []
    for k, node in enumerate(lambdas):
        others = [other - end for j, other in enumerate(lambdas) if j != k]
        polynomial = np.poly(others) / math.prod(node - end - other for other in others)
        found.append(schedules.exponential_integral(polynomial, -h, c))
    return found
