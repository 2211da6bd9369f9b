"""Quantiles of a beta distribution between the two noise levels: Lee et al. 2024 (2407.12173), "Beta Sampling is All You Need".

With both parameters below one, steps are dense at both ends. The quantiles are computed here, as NumPy has none: the
distribution function by Lentz's continued fraction (Press et al., Numerical Recipes, section 6.4; DLMF 8.17.22), and its
inverse by bisection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edgediffusion.runtimes.options import check_choice, check_range
from edgediffusion.runtimes.spacings import EVEN


@dataclass(frozen=True)
class Options:
    alpha: float = 0.6
    beta: float = 0.6
    ends: str = "linspace"

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, 0.1, 10.0)
        check_range("beta", self.beta, 0.1, 10.0)
        check_choice("ends", self.ends, EVEN)


def ramp(largest: float, smallest: float, steps: int, options: Options = Options()) -> np.ndarray:
    parts = [quantile(p, options.alpha, options.beta) for p in (1 - np.linspace(0, 1, steps)).tolist()]
    return smallest + np.array(parts) * (largest - smallest)


def quantile(p: float, a: float, b: float) -> float:
    """x with I_x(a, b) = p, by bisection down to neighbouring float64 numbers."""
    if p in (0.0, 1.0):
        return p
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if distribution(middle, a, b) < p else (low, middle)
    return (low + high) / 2


def distribution(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function I_x(a, b) for 0 < x < 1; I_x(a, b) = 1 - I_{1-x}(b, a)."""
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    # The fraction converges fast on one side of the mean only.
    if x < (a + 1) / (a + b + 2):
        return front * _fraction(x, a, b) / a
    return 1 - front * _fraction(1 - x, b, a) / b


def _fraction(x: float, a: float, b: float) -> float:
    """The continued fraction of I_x(a, b), by the modified method of Lentz."""
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, 200):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        before = value
        for term in (even, odd):
            c, d = 1 + term / c, 1 / (1 + term * d)
            value *= c * d
        if abs(value - before) <= 1e-16 * abs(value):
            break
    return value
