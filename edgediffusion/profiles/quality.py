"""How far two pictures are apart."""

from __future__ import annotations

import numpy as np


def psnr_db(image: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio of one image in decibels, 10 log10(1 / MSE); both [..., h, w, c] in 0..1. Infinite if equal."""
    error = float(np.mean((image.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else -10 * float(np.log10(error))
