"""Even in the rho-th root of the noise level: Karras et al. 2022 (2206.00364), equation 5."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgediffusion.runtimes.options import check_choice, check_range
from edgediffusion.runtimes.spacings import EVEN


@dataclass(frozen=True)
class Options:
    """The larger ``rho``, the more steps there are at low noise."""

    rho: float = 7.0
    ends: str = "linspace"

    def __post_init__(self) -> None:
        check_range("rho", self.rho, 0.1, 100.0)
        check_choice("ends", self.ends, EVEN)


def ramp(largest: float, smallest: float, steps: int, options: Options = Options()) -> np.ndarray:
    first, last = largest ** (1 / options.rho), smallest ** (1 / options.rho)
    levels: np.ndarray = (first + np.linspace(0, 1, steps) * (last - first)) ** options.rho
    return levels
