"""Channel balancing: one file per method, each with one of

    factors(layers, bits) -> np.ndarray           from what layers saw
    of_network(network) -> dict[str, Balance]     by running the network, in torch: names that begin with ``modelopt``

A layer computes x w. With a factor f for every input channel, (x / f) (f w) is the same, and both sides may be easier to
quantize. ``layers`` are those that read the same tensor (they must share factors); ``bits`` are of weights and activations.
The factors are float32 [channels], positive, 1 where nothing is to be gained; so are those of layers that ``of_network`` leaves
out. They cost a multiplication at run time: see passes/insert_qdq.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgediffusion.optimize.observed import Observed

if TYPE_CHECKING:
    import torch

__all__ = ["Balance", "Network", "balanced", "input_amax", "weight_amax"]


@dataclass(frozen=True, eq=False)
class Balance:
    """``factors`` [in] of a layer and, where the method finds one, a float branch beside its balanced weight: ``up`` [out, rank],
    ``down`` [rank, in]."""

    factors: np.ndarray
    up: np.ndarray | None = None
    down: np.ndarray | None = None


@dataclass(frozen=True)
class Network:
    """What a method gets that runs the network: its ``layers`` are those that are quantized, ``bits`` theirs of weights and activations.

    ``groups`` are the sizes of groups of inputs that a weight has scales for, 0 for one scale; ``rank`` is of branches beside weights
    of few bits.
    """

    module: torch.nn.Module
    items: Sequence[Mapping[str, np.ndarray]]
    layers: Mapping[str, Observed]
    bits: Mapping[str, tuple[int, int]]
    groups: Mapping[str, int]
    rank: int = 0
    progress: Callable[[float], None] = lambda part: None


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
