"""Affine integer quantization: ranges, scales, zero points and codes. The one place where these formulas stand.

A value x is stored as q = clip(round(x / s) + z, lowest, highest) and read as s (q - z); rounding is to nearest, half to
even, as in ONNX and torch (Jacob et al. 2018, 1712.05877, section 2). ``bits`` is 2 to 8. Every range is widened to
contain zero, so that zero stays exact: a convolution pads with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SMALLEST = 1e-8
LOW_BITS = 6  # at so few bits ranges are searched for and codes found by a method; above, nothing is to be gained by either


@dataclass(frozen=True)
class Affine:
    """Scale and zero point of one tensor, and the codes they are used with."""

    scale: float
    zero: int
    lowest: float
    highest: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """What is read back of ``x``."""
        read: np.ndarray = (np.clip(np.rint(x / self.scale) + self.zero, self.lowest, self.highest) - self.zero) * self.scale
        return read


def affine(low: float, high: float, bits: int, *, signed: bool) -> Affine:
    """The quantizer of [low, high]. ``signed``: symmetric, zero point 0, codes -(2^(b-1) - 1) to 2^(b-1) - 1."""
    if signed:
        top = 2 ** (bits - 1) - 1
        return Affine(_float32(max(abs(low), abs(high), SMALLEST) / top), 0, -top, top)
    low, high = min(0.0, low), max(0.0, high)
    top = 2**bits - 1
    scale = _float32(max(high - low, SMALLEST) / top)
    return Affine(scale, int(np.clip(np.rint(-low / scale), 0, top)), 0, top)


def channel_affine(low: np.ndarray, high: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Unsigned scales (float32) and zero points (integers), one for each channel of ``low`` and ``high``."""
    low, high = np.minimum(low, 0.0).astype(np.float64), np.maximum(high, 0.0).astype(np.float64)
    top = 2**bits - 1
    scale = (np.maximum(high - low, SMALLEST) / top).astype(np.float32)
    return scale, np.clip(np.rint(-low / scale), 0, top).astype(np.int64)


def weight_scale(amax: np.ndarray, bits: int) -> np.ndarray:
    """float32 scales of symmetric weights: amax / (2^(b-1) - 1)."""
    return np.asarray(np.maximum(amax.astype(np.float32), np.float32(SMALLEST)) / np.float32(2 ** (bits - 1) - 1))


def weight_codes(weight: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """int8 codes of a weight [out, in, ...] with scales for output channels [out], or for groups of their inputs [out, groups]."""
    top = 2 ** (bits - 1) - 1
    steps = weight.astype(np.float32, copy=False) / spread(scale, weight.shape)
    np.rint(steps, out=steps)  # in place: the largest weight of a network is read and rounded in three times its own size
    return np.asarray(np.clip(steps, -top, top, out=steps)).astype(np.int8)


def spread(scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Scales [out] or [out, groups] as they are broadcast to a weight [out, in, ...]."""
    return scale.reshape(-1, *[1] * (len(shape) - 1)) if scale.ndim == 1 else np.repeat(scale, shape[1] // scale.shape[1], 1)


E4M3_MAX = 448.0


def e4m3_scale(amax: np.ndarray | float) -> np.ndarray:
    """float32 scale of fp8 (E4M3): amax / 448."""
    return np.asarray(np.maximum(np.float32(amax), np.float32(SMALLEST)) / np.float32(E4M3_MAX))


def best_weight_amax(weight: np.ndarray, importance: np.ndarray, bits: int, *, candidates: int = 40) -> np.ndarray:
    """The amax [out] of each output channel with the least error, of its largest value times 1, 0.98, 0.96, ...

    The error is sum_i importance_i (w_i - read(w_i))^2 over the channel's weights, the diagonal part of what the layer's
    output loses. ``importance`` is broadcast to ``weight``; the search is Q-Diffusion's (2302.04304) with p = 2.
    """
    flat = weight.reshape(len(weight), -1).astype(np.float64)
    counts = np.broadcast_to(importance, weight.shape).reshape(flat.shape)
    largest = np.maximum(np.abs(flat).max(1), SMALLEST)
    top = 2 ** (bits - 1) - 1
    best, least = largest.copy(), np.full(len(flat), np.inf)
    for i in range(candidates):
        amax = largest * (1 - 0.02 * i)
        scale = (amax / top)[:, None]
        error = (counts * (flat - np.clip(np.rint(flat / scale), -top, top) * scale) ** 2).sum(1)
        better = error < least
        best[better], least[better] = amax[better], error[better]
    return np.asarray(best, np.float32)


def _float32(value: float) -> float:
    return float(np.float32(value))
