"""Normally distributed time steps: PTQ4DM (Shang et al., 2211.15736, section 3.3 and algorithm 1).

Steps are drawn from a normal law whose mean lies on the clean side of the trajectory, so that more items are near the
image. The paper and its released code differ, and both are here:

1. ``variant="code"``: t = trunc(N(mean_part, std_part) * T), T the number of steps; the script's 0.4 and 0.4.
2. ``variant="paper"``: t = floor(N(mean_part * T, T / 2)), the second argument being the variance (equation 15).

Both clamp t to [0, T - 1]; ``clip="resample"`` draws again instead (D2-DPM, 2501.08180). t counts from the clean end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgediffusion.optimize.calibration import Features, check_choice, check_range


@dataclass(frozen=True)
class Strategy:
    SKIPS: ClassVar[bool] = False
    variant: str = "code"
    mean_part: float = 0.4
    std_part: float = 0.4
    clip: str = "clamp"

    def __post_init__(self) -> None:
        check_choice("ndtc", "variant", self.variant, ("code", "paper"))
        check_choice("ndtc", "clip", self.clip, ("clamp", "resample"))
        # Farther out, nearly every draw misses the trajectory, and drawing again would not end.
        check_range("ndtc", "mean_part", self.mean_part, 0, 1)
        check_range("ndtc", "std_part", self.std_part, 0.001, 10)

    def allocate(self, steps: int, samples: int, *, seed: int, features: Callable[[str | None], Features]) -> np.ndarray:
        rng = np.random.default_rng(seed)
        t = self._draw(rng, steps, samples)
        outside = (t < 0) | (t >= steps)
        while self.clip == "resample" and outside.any():
            t[outside] = self._draw(rng, steps, int(outside.sum()))
            outside = (t < 0) | (t >= steps)
        t = np.clip(t, 0, steps - 1)
        return np.bincount(steps - 1 - t, minlength=steps)

    def _draw(self, rng: np.random.Generator, steps: int, count: int) -> np.ndarray:
        if self.variant == "paper":
            return np.floor(rng.normal(self.mean_part * steps, np.sqrt(steps / 2), count)).astype(np.int64)
        return np.trunc(rng.normal(self.mean_part, self.std_part, count) * steps).astype(np.int64)
