"""The deterministic sampler of a student of progressive distillation: Salimans and Ho 2022 (2202.00512), algorithm 2.

A student of N steps knows t = 1, 1 - 1/N, ..., 1/N, and goes from one to the next by DDIM's step; the last one gives its
estimate of x_0. With guidance embedded it is the deterministic sampler of Meng et al. 2023 (2210.03142). The teacher's
number of steps is halved in each round, so take a power of two, the one that the checkpoint was made for.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.runtimes.samplers.ddim import sample
from edgediffusion.runtimes.schedules import Points, alpha_bars, check_timesteps, levels, require_kind, variance_preserving
from edgediffusion.runtimes.spacings import EVEN

__all__ = ["KIND", "ORDER", "points", "sample"]

ORDER = 1.0
KIND = "diffusion"


def points(schedule: NoiseSchedule, steps: int) -> Points:
    """t = 1 - i / N in whole training timesteps, which is trailing spacing; or what another spacing than an even one picks."""
    require_kind(schedule, "guided-distillation", is_flow=False)
    if schedule.spacing in EVEN:
        schedule = replace(schedule, spacing="trailing")
    bars, timesteps = alpha_bars(schedule), np.round(levels(schedule, steps)[1])
    return Points.chain(tuple(variance_preserving(bars, int(t)) for t in check_timesteps(timesteps, schedule.train_steps)))
