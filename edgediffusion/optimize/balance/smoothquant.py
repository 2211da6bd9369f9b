"""SmoothQuant (Xiao et al. 2022, 2211.10438, equation 4): f = max|x|^a / max|w|^(1 - a), with a = 0.8 as NVIDIA has it for
diffusion. The maximum runs over all sampling steps, which makes it DiTAS' temporal aggregation too (2409.07756)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgediffusion.optimize.balance import balanced, input_amax, weight_amax
from edgediffusion.optimize.observed import Observed

ALPHA = 0.8


def factors(layers: Sequence[Observed], bits: tuple[int, int]) -> np.ndarray:
    return balanced(input_amax(layers), weight_amax(layers), ALPHA)
