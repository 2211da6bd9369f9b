"""Peak signal-to-noise ratio: 10 log10(1 / MSE) for pictures in 0..1."""

from __future__ import annotations

import numpy as np

from edgediffusion.profiles.metrics import HIGHER, View

UNIT, BETTER, NEEDS = "dB", HIGHER, ""
MOST_DB = 150.0  # of pictures that are equal; float32 cannot tell anything closer


def pairs(pictures: View, reference: View) -> np.ndarray:
    return np.minimum([psnr_db(a, b) for a, b in zip(pictures.pixels, reference.pixels, strict=True)], MOST_DB)


def psnr_db(image: np.ndarray, reference: np.ndarray) -> float:
    """PSNR of one image in decibels; both [..., h, w, c] in 0..1. Infinite if equal."""
    error = float(np.mean((image.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else -10 * float(np.log10(error))
