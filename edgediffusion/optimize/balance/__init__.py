"""Channel balancing: one file per method, each with ``factors(layers, bits) -> np.ndarray``.

A layer computes x w. With a factor f for every input channel, (x / f) (f w) is the same, and both sides may be easier to
quantize. ``layers`` are those that read the same tensor (they must share factors); ``bits`` are of weights and activations.
The factors are float32 [channels], positive, 1 where nothing is to be gained. Where an engine takes one scale for each
channel in QuantizeLinear, the factors cost nothing at run time: see passes/insert_qdq.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgediffusion.optimize.observed import Observed

__all__ = ["input_amax", "weight_amax"]


def input_amax(layers: Sequence[Observed]) -> np.ndarray:
    """max |x| of each channel over all items and steps. [channels]"""
    return layers[0].input.amax


def weight_amax(layers: Sequence[Observed]) -> np.ndarray:
    """max |w| over the outputs of all layers, for each input channel. [channels]"""
    largest = [np.abs(layer.weight.reshape(*layer.weight.shape[:2], -1)).max((0, 2)) for layer in layers]
    return np.asarray(np.stack(largest).max(0))


def balanced(x: np.ndarray, w: np.ndarray, alpha: float) -> np.ndarray:
    """x^alpha / w^(1 - alpha), scaled to a geometric mean of 1; 1 where a channel is always zero on either side."""
    alive = (x > 0) & (w > 0)
    factors = np.ones(len(x), np.float64)
    if alive.any():
        logs = alpha * np.log(x[alive].astype(np.float64)) - (1 - alpha) * np.log(w[alive].astype(np.float64))
        factors[alive] = np.exp(logs - logs.mean())
    return factors.astype(np.float32)
