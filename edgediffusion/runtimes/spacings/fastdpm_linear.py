"""The linear steps of FastDPM: Kong and Ping 2021 (2106.00132), section 3.2. Both ends of the training range are called."""

from __future__ import annotations

import numpy as np

from edgediffusion.bundle import NoiseSchedule


def timesteps(schedule: NoiseSchedule, steps: int, *, with_end: bool) -> np.ndarray:
    """floor(i (T - 1) / (S - 1)); one step is the last training timestep."""
    last = schedule.train_steps - 1
    if steps == 1:
        return np.array([float(last)])
    return np.array([float(i * last // (steps - 1)) for i in range(steps)])[::-1]
