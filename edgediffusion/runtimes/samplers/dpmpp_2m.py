"""DPM-Solver++(2M): Lu et al. 2022 (2211.01095), algorithm 2; the first and the last step are of order one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.runtimes import schedules
from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.options import check_choice
from edgediffusion.runtimes.samplers import Denoise, _dpmpp
from edgediffusion.runtimes.schedules import Points

ORDER = 2.0
KIND = "both"


@dataclass(frozen=True)
class Options:
    """``order`` 1 is DDIM and 3 is DPM-Solver++(3M); ``kind`` weighs the difference of two estimates as midpoint or as Heun."""

    order: int = 2
    kind: str = "midpoint"

    def __post_init__(self) -> None:
        check_choice("order", self.order, (1, 2, 3))
        check_choice("kind", self.kind, _dpmpp.KINDS)


def points(schedule: NoiseSchedule, steps: int, options: Options = Options()) -> Points:
    """As diffusers spaces them: unlike for DDIM, leading and linspace divide the range into steps + 1 parts."""
    return schedules.multistep(schedule, steps)


def sample(denoise: Denoise, x: np.ndarray, points: Points, noise: Noise, options: Options = Options()) -> Iterator[np.ndarray]:
    return _dpmpp.sample(denoise, x, points, None, order=options.order, kind=options.kind)
