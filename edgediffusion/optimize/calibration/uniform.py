"""The same number of items at every sampling step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Strategy:
    def allocate(self, steps: int, samples: int, *, seed: int) -> np.ndarray:
        """Samples / steps each; what does not divide is spread evenly over the trajectory."""
        edges = np.arange(steps + 1) * samples // steps
        return np.diff(edges)
