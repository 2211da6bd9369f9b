"""SDE-DPM-Solver++(3M): the reverse SDE with three estimates of x_0, from k-diffusion (``sample_dpmpp_3m_sde``)."""

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
    """``source`` of the weight of the second derivative.

    k-diffusion's vanishes with the step, as in a Taylor series. That of diffusers 0.42 is the same less one, with which the
    spread of the pictures grows with the number of steps (docs/samplers.md); it is there to draw what diffusers draws.
    """

    source: str = "k-diffusion"

    def __post_init__(self) -> None:
        check_choice("source", self.source, ("k-diffusion", "diffusers"))


def points(schedule: NoiseSchedule, steps: int, options: Options = Options()) -> Points:
    """Those of ``dpmpp-2m``."""
    return schedules.multistep(schedule, steps)


def sample(denoise: Denoise, x: np.ndarray, points: Points, noise: Noise, options: Options = Options()) -> Iterator[np.ndarray]:
    return _dpmpp.sample(denoise, x, points, noise, order=3, kind=options.source)


def noise_terms(at: Point, to: Point, options: Options = Options()) -> tuple[float, float]:
    """Exact for a step of first order."""
    return _dpmpp.noise_terms(at, to)
