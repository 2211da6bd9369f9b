"""A branch of low rank beside the quantized weight: SVDQuant (Li et al. 2024, 2411.05007).

What few bits cannot hold, large singular values and the channels that stand out, goes through two thin float matrices:

    y = Q(x / f) Q(R)^T + (x / f) down^T up^T,      f w = up down + R
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgediffusion.optimize.integers import spread, weight_codes, weight_scale

ROUNDS = 10  # the authors alternate up to 100 times; here the error stands still after a few


def low_rank(
    weight: np.ndarray, rank: int, bits: int, importance: np.ndarray, *, read: Callable[[np.ndarray], np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """``up`` [out, rank] and ``down`` [rank, in] of a balanced weight [out, in], float32.

    The branch and what is left are fitted in turn, L <- SVD_r(W - Q(W - L)), and the pair with the least error kept:
    that of the weight read back, squared and weighted by ``importance`` [in], the mean square of the input. ``read`` gives what is read
    back of a weight, by default from integers of ``bits``.
    """
    wide, best, least = weight.astype(np.float64), None, np.inf
    target = wide
    for _ in range(ROUNDS):
        u, values, v = np.linalg.svd(target, full_matrices=False)
        up, down = u[:, :rank] * values[:rank], v[:rank]
        rest = wide - up @ down
        back = _read_integers(rest, bits) if read is None else read(rest)
        error = float(((rest - back) ** 2 * importance).sum())
        if error >= least:
            break
        best, least = (up, down), error
        target = wide - back
    assert best is not None
    return best[0].astype(np.float32), best[1].astype(np.float32)


def _read_integers(weight: np.ndarray, bits: int) -> np.ndarray:
    scale = weight_scale(np.abs(weight).max(1), bits)
    return np.asarray(weight_codes(weight, scale, bits) * spread(scale, weight.shape))
