"""The same number of items at every sampling step: the baseline of PTQ4DM (2211.15736) and what NVIDIA does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgediffusion.optimize.calibration import Features, spread


@dataclass(frozen=True)
class Strategy:
    SKIPS: ClassVar[bool] = False

    def allocate(self, steps: int, samples: int, *, seed: int, features: Callable[[str | None], Features]) -> np.ndarray:
        """Samples / steps each; what does not divide is spread evenly over the trajectory."""
        return spread(samples, steps)
