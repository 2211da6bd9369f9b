"""Steps by how dense and how diverse their features are: time-step-aware density and variety, EDA-DM (2401.04585).

F_i is the tensor that enters the attention in the middle of the network, at step i, over one batch of trajectories:

1. Density: D_i is the number of other steps j with mean((F_i - F_j)^2) <= r.
2. Variety: V_i is the sum, over all other steps, pictures and places, of 1 - cos(F_i, F_j) along the channels.
3. Both go to [0, 1] by their smallest and largest value; s_i = D_i + lambda V_i, and step i gets round(N s_i / sum(s)).
4. If the counts do not sum to N: lacking items go to the steps with the largest counts, one each; surplus ones are
   taken one by one from the last step backwards. Steps at 0 are passed over.

The authors' r and lambda, in the units of their features, are the settings ``cifar``, ``imagenet``, ``bedroom``,
``church`` and ``coco``. Ours: ``setting="auto"``, where r is the median of the mean squared differences of all pairs,
so that it fits features of any scale; a D or V that is the same for all steps counts as zero (the authors' code divides
by zero), and if both are, every step gets the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from edgediffusion.optimize.calibration import Features, check_choice, check_range, spread

# (r, lambda) of the authors' scripts
SETTINGS: Mapping[str, tuple[float | None, float]] = MappingProxyType(
    {
        "auto": (None, 1.2),
        "cifar": (3.0, 1.2),
        "imagenet": (3.0, 1.2),
        "bedroom": (0.3, 1.0),
        "church": (0.3, 1.0),
        "coco": (0.3, 5.0),
    }
)


@dataclass(frozen=True)
class Strategy:
    """``radius`` (r) and ``variety`` (lambda) replace those of the setting; ``cut`` is the module whose input is F."""

    SKIPS: ClassVar[bool] = False
    setting: str = "auto"
    radius: float | None = None
    variety: float | None = None
    cut: str | None = None

    def __post_init__(self) -> None:
        check_choice("tdac", "setting", self.setting, tuple(SETTINGS))
        check_range("tdac", "radius", self.radius, 0, 1e30)
        check_range("tdac", "variety", self.variety, 0, 1e6)

    def allocate(self, steps: int, samples: int, *, seed: int, features: Callable[[str | None], Features]) -> np.ndarray:
        radius, weight = SETTINGS[self.setting]
        distance, variety = pairs(features(self.cut))
        if self.radius is not None:
            radius = self.radius
        return share(density(distance, radius), variety, weight if self.variety is None else self.variety, samples)


def pairs(features: Features) -> tuple[np.ndarray, np.ndarray]:
    """The mean squared differences of all pairs of steps, float64 [steps, steps], and the variety V, float64 [steps]."""
    values = features.values
    norms = np.sqrt(np.einsum("spc,spc->sp", values, values, dtype=np.float64))
    distance, variety = np.zeros((len(values), len(values))), np.zeros(len(values))
    for i, row in enumerate(values):  # pairs one by one: all of them at once would be steps x steps x a batch of features
        features.progress("comparing steps", i / len(values))
        for j in range(i):
            distance[i, j] = distance[j, i] = np.square(row - values[j]).mean(dtype=np.float64)
            dots = np.einsum("pc,pc->p", row, values[j], dtype=np.float64)
            # Of a place where a feature is zero there is no direction; it is as far from all as a right angle.
            apart = (1 - dots / np.maximum(norms[i] * norms[j], np.finfo(np.float64).tiny)).sum()
            variety[i] += apart
            variety[j] += apart
    features.progress("comparing steps", 1.0)
    return distance, variety


def density(distance: np.ndarray, radius: float | None) -> np.ndarray:
    """D: for each step, how many others are within ``radius``, by default the median distance. int [steps]."""
    others = ~np.eye(len(distance), dtype=bool)
    if radius is None:
        radius = float(np.median(distance[others])) if others.any() else 0.0
    near: np.ndarray = ((distance <= radius) & others).sum(axis=1)
    return near


def share(density: np.ndarray, variety: np.ndarray, weight: float, samples: int) -> np.ndarray:
    """Counts of D, V and lambda: numbers 3 and 4 above. int [steps]."""
    score = _unit(density) + weight * _unit(variety)
    if not score.any():
        return spread(samples, len(score))
    counts: np.ndarray = np.rint(score / score.sum() * samples).astype(np.int64)
    lacking = samples - int(counts.sum())
    if lacking > 0:
        counts[np.argsort(-counts, kind="stable")[:lacking]] += 1
    at = len(counts) - 1
    while lacking < 0:
        if counts[at] > 0:
            counts[at] -= 1
            lacking += 1
        at = (at - 1) % len(counts)
    return counts


def _unit(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros(len(values))
