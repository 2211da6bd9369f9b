"""Channel-wise salience balancing with Spearman weights: PTQ4DiT (Wu et al. 2024, 2405.16005, section 3).

s_t is max|x| of each channel at sampling step t, s_w max|w|. Steps whose salient channels are not the weight's count
more: rho_t = Spearman(s_t, s_w), eta = softmax(-rho), s_x = sum_t eta_t s_t; then f = sqrt(s_x / s_w).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgediffusion.optimize.balance import balanced, weight_amax
from edgediffusion.optimize.observed import Observed


def factors(layers: Sequence[Observed], bits: tuple[int, int]) -> np.ndarray:
    w = weight_amax(layers)
    return balanced(salience(np.stack([s for _, s in sorted(layers[0].steps.items())]), w), w, 0.5)


def salience(steps: np.ndarray, w: np.ndarray) -> np.ndarray:
    """s_x [channels] of the channels' maxima at each step [steps, channels] and the weight's [channels]."""
    rho = np.array([spearman(s, w) for s in steps])
    eta = np.exp(-rho - (-rho).max())
    weighted: np.ndarray = (eta[:, None] * steps).sum(0) / eta.sum()
    return weighted


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of ranks, ties sharing their mean rank; 0 where one side is constant."""
    ranks = [_ranks(v) - (len(v) - 1) / 2 for v in (a, b)]
    norm = float(np.linalg.norm(ranks[0]) * np.linalg.norm(ranks[1]))
    return float(ranks[0] @ ranks[1]) / norm if norm else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray(np.cumsum(count) - (count + 1) / 2)[group]
