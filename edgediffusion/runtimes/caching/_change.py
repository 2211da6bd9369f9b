"""How much a tensor has changed, as the adaptive policies ask."""

from __future__ import annotations

import numpy as np


def relative_change(now: np.ndarray, before: np.ndarray) -> float:
    """mean |now - before| / mean |before|, over all rows; infinite where there was nothing."""
    size = float(np.abs(before).mean(dtype=np.float64))
    change = float(np.abs(now.astype(np.float32) - before).mean(dtype=np.float64))
    return change / size if size > 0 else float("inf")
