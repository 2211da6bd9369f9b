"""The bootstrap (Efron 1979): how far a figure would move if other pictures had been drawn from the same pipeline.

Pictures are drawn again from those there are, with replacement. An interval reaches from the 2.5th to the 97.5th percentile of
the figure over the resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgediffusion.errors import ArgumentError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Bootstrap:
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resamples < 1 or self.seed < 0:
            got = f"resamples={self.resamples}, seed={self.seed}"
            raise ArgumentError("The bootstrap cannot be done so", got=got, allowed="resamples >= 1, seed >= 0")

    def draws(self, items: int) -> np.ndarray:
        """Which items each resample takes: int [resamples, items]; the same ones for every metric, so that figures stay paired."""
        return np.random.default_rng(self.seed).integers(0, items, (self.resamples, items))

    def counts(self, items: int) -> np.ndarray:
        """How often each item counts: float [1 + resamples, items], first the items themselves, then each resample of ``draws``."""
        taken = [np.bincount(row, minlength=items) for row in self.draws(items)]
        return np.stack([np.ones(items), *taken]).astype(np.float64)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The percentile interval of a figure's resamples."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, (tail, 1 - tail))
    return float(low), float(high)
