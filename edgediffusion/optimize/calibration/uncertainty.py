"""Steps whose channels are hardest to assign to a range: active timestep selection, APQ-DM (2305.18723).

APQ-DM quantizes a layer with a few range groups, and a softmax for each step and channel says which group a channel
belongs to. It adds items to its calibration set where that softmax is most undecided: in each round the step with the
largest H_t - w n_t, the last one of equals, where H_t is the mean entropy of the softmax over channels and n_t how
many items step t has already; the first 30 of 100 steps are never chosen. That loop is its code's, and this file's.

Ours is where the softmax comes from. There it is learned together with the quantizer; here, before any quantizer
exists, it follows from the ranges themselves, of the tensor in the middle of the network that ``tdac`` looks at too:

1. a[t, c] = log2 of the largest |F| of channel c at step t. Groups are the quantiles q_g = (g - 1/2) / G of all a.
2. p[t, g, c] = softmax over g of -(a[t, c] - q_g)^2 / (2 d^2), d the mean distance of neighbouring groups.
3. H_t is the mean over c of -sum_g p log p, brought to [0, 1] by its smallest and largest value over the steps.
4. w is in units of a step's even share: w = ``penalty`` * (steps that may be chosen) / N for N items. At a penalty of
   one, the most undecided step gets up to one even share more than the most decided one; twice as much, half of that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgediffusion.optimize.calibration import Features, check_range

_SMALLEST = 1e-12  # of the largest range; a channel that is always zero has no logarithm


@dataclass(frozen=True)
class Strategy:
    """``groups`` (G) ranges, ``penalty`` on steps already chosen, ``skip`` the part of the first steps that are never
    chosen, ``cut`` the module whose input is F."""

    SKIPS: ClassVar[bool] = False
    groups: int = 8
    penalty: float = 1.0
    skip: float = 0.3
    cut: str | None = None

    def __post_init__(self) -> None:
        check_range("uncertainty", "groups", self.groups, 2, 256)
        check_range("uncertainty", "penalty", self.penalty, 0, 1e6)
        check_range("uncertainty", "skip", self.skip, 0, 0.99)

    def allocate(self, steps: int, samples: int, *, seed: int, features: Callable[[str | None], Features]) -> np.ndarray:
        first = int(self.skip * steps)
        ranges = np.abs(features(self.cut).values).max(axis=1)
        counts = np.zeros(steps, np.int64)
        counts[first:] = choose(entropy(ranges, self.groups)[first:], samples, self.penalty)
        return counts


def entropy(ranges: np.ndarray, groups: int) -> np.ndarray:
    """H_t in nats: how undecided the channels of each step are between groups. ``ranges`` [steps, channels] -> [steps]."""
    a = np.log2(np.maximum(ranges.astype(np.float64), max(_SMALLEST * ranges.max(), np.finfo(np.float64).tiny)))
    q = np.quantile(a, (np.arange(groups) + 0.5) / groups)
    d = (q[-1] - q[0]) / (groups - 1)
    if d == 0:
        return np.full(len(a), np.log(groups))  # all groups are the same, and every channel is undecided between them
    logits = -((a[:, None, :] - q[None, :, None]) ** 2) / (2 * d**2)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    h: np.ndarray = -(p * np.log(np.maximum(p, np.finfo(np.float64).tiny))).sum(axis=1).mean(axis=1)
    return h


def choose(h: np.ndarray, samples: int, penalty: float) -> np.ndarray:
    """The greedy loop: counts, int [steps], of ``samples`` choices of the largest h - w n, the last one of equals."""
    spread = h.max() - h.min()
    unit = (h - h.min()) / spread if spread > 0 else np.zeros(len(h))
    w = penalty * len(h) / samples
    counts = np.zeros(len(h), np.int64)
    for _ in range(samples):
        score = unit - w * counts
        counts[len(h) - 1 - int(np.argmax(score[::-1]))] += 1
    return counts
