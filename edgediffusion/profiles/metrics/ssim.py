"""Structural similarity: Wang, Bovik, Sheikh, Simoncelli 2004, "Image quality assessment: from error visibility to structural
similarity", equation 13 with their constants: a Gaussian window of 11 x 11 and sigma 1.5, K1 = 0.01, K2 = 0.03, L = 1.

The mean over the places where the window lies inside the picture, and over channels.
"""

from __future__ import annotations

import numpy as np

from edgediffusion.errors import ArgumentError
from edgediffusion.profiles.metrics import HIGHER, View

UNIT, BETTER, NEEDS = "", HIGHER, ""
WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2
_PLACES = np.arange(WINDOW) - WINDOW // 2
_KERNEL = np.exp(-(_PLACES**2) / (2 * SIGMA**2))
_KERNEL /= _KERNEL.sum()


def pairs(pictures: View, reference: View) -> np.ndarray:
    return np.array([ssim(a, b) for a, b in zip(pictures.pixels, reference.pixels, strict=True)])


def ssim(image: np.ndarray, reference: np.ndarray) -> float:
    """SSIM of one image; both [h, w, c] in 0..1. 1 if equal.

    Raises:
        ArgumentError: a side is shorter than the window.
    """
    if min(image.shape[:2]) < WINDOW:
        raise ArgumentError("A picture is too small for SSIM", got=image.shape[:2], allowed=f"{WINDOW} pixels and more a side")
    x, y = image.astype(np.float64), reference.astype(np.float64)
    mean_x, mean_y = _windowed(x), _windowed(y)
    var_x, var_y = _windowed(x * x) - mean_x**2, _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    return float(np.mean(luminance * (2 * covariance + C2) / (var_x + var_y + C2)))


def _windowed(x: np.ndarray) -> np.ndarray:
    """The Gaussian mean around every place whose window lies inside: [h, w, c] -> [h - 10, w - 10, c]."""
    for axis in (0, 1):
        inside = x.shape[axis] - WINDOW + 1
        x = np.asarray(sum(weight * np.take(x, range(i, i + inside), axis) for i, weight in enumerate(_KERNEL)))
    return x
