"""Multiples of a whole distance, from ``steps_offset`` up: Lin et al. 2023 (2305.08891), table 2, with diffusers' rounding.

The last training timesteps are left out, so a sampler never starts from pure noise.
"""

from __future__ import annotations

import numpy as np

from edgediffusion.bundle import NoiseSchedule


def timesteps(schedule: NoiseSchedule, steps: int, *, with_end: bool) -> np.ndarray:
    parts = steps + with_end
    return np.arange(parts)[::-1][:steps] * float(schedule.train_steps // parts) + schedule.steps_offset
