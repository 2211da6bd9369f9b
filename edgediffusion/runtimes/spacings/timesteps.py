"""Timesteps that the caller lists, as diffusers' ``timesteps`` argument: ``timesteps:at=999/749/499/249``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.errors import ArgumentError
from edgediffusion.runtimes.spacings._listed import check_count, falling


@dataclass(frozen=True)
class Options:
    """``at`` are training timesteps, descending, with / between them; empty where the request has none."""

    at: str = ""

    def __post_init__(self) -> None:
        falling(self.at, "timesteps")


DEFAULT = Options()


def timesteps(schedule: NoiseSchedule, steps: int, options: Options = DEFAULT, *, with_end: bool) -> np.ndarray:
    listed = falling(options.at, "timesteps")
    check_count(listed, steps, "timesteps")
    if listed[0] > schedule.train_steps - 1:
        raise ArgumentError("There is no such training timestep", got=f"{listed[0]:g}", allowed=f"0 to {schedule.train_steps - 1}")
    return listed
