"""Euler's method on the probability-flow ODE: Karras et al. 2022 (2206.00364), algorithm 2 without churn.

In the paper's state y = x / alpha and s = sigma / alpha a step is y + (s' - s) (y - x_0) / s. Times alpha' that is
alpha' x_0 + sigma' (x - alpha x_0) / sigma: DDIM's update. Only the points differ.
"""

from __future__ import annotations

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.runtimes.samplers.ddim import sample
from edgediffusion.runtimes.schedules import Points, interpolated, require_kind

__all__ = ["KIND", "ORDER", "points", "sample"]

ORDER = 1.0
KIND = "diffusion"


def points(schedule: NoiseSchedule, steps: int) -> Points:
    require_kind(schedule, "euler", is_flow=False)
    return interpolated(schedule, steps)
