"""Euler's method on a rectified flow: Esser et al. 2024 (2403.03206).

x + (sigma' - sigma) v with v = noise - x_0 = (x - x_0) / sigma is DDIM's update at alpha = 1 - sigma.
"""

from __future__ import annotations

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.runtimes.samplers.ddim import sample
from edgediffusion.runtimes.schedules import Points, check_steps, flow, ramped, require_kind, shifted, spaced_as

__all__ = ["KIND", "ORDER", "points", "sample"]

ORDER = 1.0
KIND = "flow"


def points(schedule: NoiseSchedule, steps: int) -> Points:
    """As diffusers' FlowMatchEulerDiscreteScheduler spaces them: its smallest sigma is shifted twice.

    With trailing spacing, which is how FluxPipeline asks that scheduler, sigmas are 1, 1 - 1 / steps, ..., 1 / steps, shifted once.
    """
    require_kind(schedule, "flow-euler", is_flow=True)
    check_steps(steps, schedule.train_steps)
    if spaced_as(schedule, "trailing"):
        return flow(schedule, ramped(schedule, shifted(schedule, np.linspace(1.0, 1.0 / steps, steps))))
    smallest = float(shifted(schedule, np.array(1.0 / schedule.train_steps)))
    return flow(schedule, ramped(schedule, shifted(schedule, np.linspace(1.0, smallest, steps))))
