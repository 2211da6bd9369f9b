"""All items at the first step, where the input is pure noise: one-step calibration (A-QDiT, Yang et al., 2406.11100).

counts = [N, 0, 0, ...]. The cheapest strategy, one call of the network for each item; what activations do later on the
trajectory, it does not see. After the paper's description: there was no code to compare with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgediffusion.optimize.calibration import Features


@dataclass(frozen=True)
class Strategy:
    SKIPS: ClassVar[bool] = True

    def allocate(self, steps: int, samples: int, *, seed: int, features: Callable[[str | None], Features]) -> np.ndarray:
        return np.bincount([0], weights=[samples], minlength=steps).astype(np.int64)
