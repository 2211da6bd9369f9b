"""From the last training timestep down, the end left out: Lin et al. 2023 (2305.08891), table 2, with diffusers' rounding."""

from __future__ import annotations

import numpy as np

from edgediffusion.bundle import NoiseSchedule


def timesteps(schedule: NoiseSchedule, steps: int, *, with_end: bool) -> np.ndarray:
    total = schedule.train_steps
    return np.round(total - np.arange(steps) * (total / steps)) - 1
