"""SDE-DPM-Solver++(2M): the reverse SDE with the multistep rule of Lu et al. 2022 (2211.01095); from k-diffusion.

diffusers' ``DPMSolverMultistepScheduler`` with ``algorithm_type="sde-dpmsolver++"``, whose independent noises it draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.runtimes import schedules
from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.options import check_choice
from edgediffusion.runtimes.samplers import Denoise, _dpmpp
from edgediffusion.runtimes.schedules import Point, Points

ORDER = 0.0
KIND = "both"


@dataclass(frozen=True)
class Options:
    order: int = 2
    kind: str = "midpoint"

    def __post_init__(self) -> None:
        check_choice("order", self.order, (1, 2))
        check_choice("kind", self.kind, _dpmpp.KINDS)


def points(schedule: NoiseSchedule, steps: int, options: Options = Options()) -> Points:
    """Those of ``dpmpp-2m``."""
    return schedules.multistep(schedule, steps)


def sample(denoise: Denoise, x: np.ndarray, points: Points, noise: Noise, options: Options = Options()) -> Iterator[np.ndarray]:
    return _dpmpp.sample(denoise, x, points, noise, order=options.order, kind=options.kind)


def noise_terms(at: Point, to: Point, options: Options = Options()) -> tuple[float, float]:
    """Exact for a step of first order; a difference of two estimates adds at most its half to c."""
    return _dpmpp.noise_terms(at, to)
