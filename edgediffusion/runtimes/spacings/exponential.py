"""Even in the logarithm of the noise level, and so in lambda = log(alpha / sigma): Lu et al. 2022 (2206.00927), section 3.4."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edgediffusion.runtimes.options import check_choice
from edgediffusion.runtimes.spacings import EVEN


@dataclass(frozen=True)
class Options:
    ends: str = "linspace"

    def __post_init__(self) -> None:
        check_choice("ends", self.ends, EVEN)


def ramp(largest: float, smallest: float, steps: int, options: Options = Options()) -> np.ndarray:
    levels: np.ndarray = np.exp(np.linspace(math.log(largest), math.log(smallest), steps))
    return levels
