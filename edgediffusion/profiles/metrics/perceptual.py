"""A perceptual distance in the layers of the judge. Ours: LPIPS' equation 1 without its networks and its learned weights.

Zhang et al. 2018 (1801.03924): the channels at each place of a layer are divided by their length, and the squared
difference of the two pictures is summed over channels and averaged over places. LPIPS then weighs channels as people
judged pictures; here each layer counts as it is, and the distance is the mean over layers. Its values compare with those
of the same judge and with nothing else.
"""

from __future__ import annotations

import numpy as np

from edgediffusion.profiles.metrics import LOWER, View

UNIT, BETTER, NEEDS = "", LOWER, "layers"
_TINY = 1e-10  # LPIPS' own: a place where no channel answers stays zero


def pairs(pictures: View, reference: View) -> np.ndarray:
    distances = [np.sum((_unit(a) - _unit(b)) ** 2, axis=1).mean(1) for a, b in zip(pictures.layers, reference.layers, strict=True)]
    return np.asarray(np.mean(distances, axis=0, dtype=np.float64))


def _unit(layer: np.ndarray) -> np.ndarray:
    """[n, channels, places], every place at length 1."""
    return np.asarray(layer / (np.linalg.norm(layer, axis=1, keepdims=True) + _TINY))
