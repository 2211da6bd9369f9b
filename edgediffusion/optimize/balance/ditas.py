"""DiTAS' temporal-aggregated smoothing (Dong and Zhang 2024, 2409.07756): f = a^alpha / w^(1 - alpha), a = max |x| over all steps.

alpha is of 0, 0.05, ..., 1, for each tensor the one with the least error of the layers' outputs; the authors measure that error by
running each layer, here it is the expected one (``search.expected_error``), which needs no run.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgediffusion.optimize.balance import balanced, input_amax, weight_amax
from edgediffusion.optimize.balance.search import expected_error
from edgediffusion.optimize.observed import Observed

FLOOR = 1e-4  # of a, the authors' clamp


def factors(layers: Sequence[Observed], bits: tuple[int, int]) -> np.ndarray:
    a, w = np.maximum(input_amax(layers), FLOOR), weight_amax(layers)
    candidates = [balanced(a, w, float(alpha)) for alpha in np.linspace(0, 1, 21)]
    return min(candidates, key=lambda f: sum(expected_error(layer, f, bits) for layer in layers))
