"""The quadratic steps of FastDPM: Kong and Ping 2021 (2106.00132), section 3.2; dense where there is little noise.

They begin at 0.8 of the training range, so a sampler takes pure noise for a state that still has some signal.
"""

from __future__ import annotations

import math

import numpy as np

from edgediffusion.bundle import NoiseSchedule


def timesteps(schedule: NoiseSchedule, steps: int, *, with_end: bool) -> np.ndarray:
    """floor(q^2) for q evenly from sqrt(0.8 T) to 0; one step is the first of them."""
    # A millionth is added before rounding down: the square of a root may lie just below a whole number.
    return np.floor(np.linspace(math.sqrt(0.8 * schedule.train_steps), 0, steps) ** 2 + 1e-6)
