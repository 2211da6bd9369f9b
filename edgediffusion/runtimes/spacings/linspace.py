"""From the last training timestep to the first, both included: Lin et al. 2023 (2305.08891), table 2."""

from __future__ import annotations

import numpy as np

from edgediffusion.bundle import NoiseSchedule


def timesteps(schedule: NoiseSchedule, steps: int, *, with_end: bool) -> np.ndarray:
    return np.linspace(0, schedule.train_steps - 1, steps + with_end)[::-1][:steps]
