"""Means and covariances of pairs, added up batch by batch: no prediction is kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Moments:
    """Of pairs (e, d): what the float network predicts, and the quantized one's error d = q - e. Float64.

    ``count`` is [steps, channels], ``mean`` [steps, channels, 2], ``comoment`` [steps, channels, 2, 2] the sum of products
    of deviations from the mean. Batches are joined as by Chan, Golub and LeVeque (1979), which does not cancel where the
    error is far smaller than its mean.
    """

    count: np.ndarray
    mean: np.ndarray
    comoment: np.ndarray

    @classmethod
    def empty(cls, steps: int, channels: int) -> Moments:
        return cls(np.zeros((steps, channels)), np.zeros((steps, channels, 2)), np.zeros((steps, channels, 2, 2)))

    def add(self, i: int, reference: np.ndarray, quantized: np.ndarray, *, bounds: Bounds | None = None) -> None:
        """Add the pairs of step i, both arrays [images, channels, ...]; those outside ``bounds`` are left out."""
        pairs = _pairs(reference, quantized)
        kept = np.ones(pairs.shape[1:], bool) if bounds is None else bounds.hold(i, pairs)
        count = kept.sum(axis=-1)
        pairs = np.where(kept, pairs, 0.0)
        some = np.maximum(count, 1)
        mean = (pairs.sum(axis=-1) / some).T
        deviation = np.where(kept, pairs - mean.T[..., None], 0.0)
        comoment = np.einsum("acn,bcn->cab", deviation, deviation)
        self._join(i, count, mean, comoment)

    def _join(self, i: int, count: np.ndarray, mean: np.ndarray, comoment: np.ndarray) -> None:
        total = np.maximum(self.count[i] + count, 1)
        apart = mean - self.mean[i]
        between = (self.count[i] * count / total)[:, None, None] * apart[:, :, None] * apart[:, None, :]
        self.comoment[i] += comoment + between
        self.mean[i] += apart * (count / total)[:, None]
        self.count[i] += count

    def pooled(self) -> Moments:
        """All channels of a step as one: [steps, 1, ...]."""
        count = self.count.sum(axis=1, keepdims=True)
        mean = (self.count[..., None] * self.mean).sum(axis=1, keepdims=True) / np.maximum(count, 1)[..., None]
        apart = self.mean - mean
        between = self.count[..., None, None] * apart[..., :, None] * apart[..., None, :]
        return Moments(count, mean, (self.comoment + between).sum(axis=1, keepdims=True))

    @property
    def covariance(self) -> np.ndarray:
        """[steps, channels, 2, 2]"""
        covariance: np.ndarray = self.comoment / np.maximum(self.count, 1)[..., None, None]
        return covariance

    def errors(self, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
        """Mean square of scale q + shift - e: [steps, channels]; ``scale`` and ``shift`` are [steps, channels or 1]."""
        e, d = scale - 1.0, scale  # scale (e + d) + shift - e
        bias = e * self.mean[..., 0] + d * self.mean[..., 1] + shift
        c = self.covariance
        square: np.ndarray = e * e * c[..., 0, 0] + 2 * e * d * c[..., 0, 1] + d * d * c[..., 1, 1] + bias * bias
        return square


@dataclass(frozen=True)
class Bounds:
    """Which pairs are no outliers: q and d within so many standard deviations of their means; arrays [steps, channels or 1, 2]."""

    centre: np.ndarray
    reach: np.ndarray

    @classmethod
    def of(cls, moments: Moments, deviations: float) -> Bounds:
        m, c = moments.mean, moments.covariance
        centre = np.stack([m[..., 0] + m[..., 1], m[..., 1]], axis=-1)
        variance = np.stack([c[..., 0, 0] + 2 * c[..., 0, 1] + c[..., 1, 1], c[..., 1, 1]], axis=-1)
        return cls(centre, deviations * np.sqrt(variance))

    def hold(self, i: int, pairs: np.ndarray) -> np.ndarray:
        e, d = pairs
        centre, reach = self.centre[i][:, None, :], self.reach[i][:, None, :]
        inside: np.ndarray = (np.abs(e + d - centre[..., 0]) <= reach[..., 0]) & (np.abs(d - centre[..., 1]) <= reach[..., 1])
        return inside


def _pairs(reference: np.ndarray, quantized: np.ndarray) -> np.ndarray:
    """float64 [2, channels, numbers]"""
    e, q = (np.moveaxis(a, 1, 0).reshape(a.shape[1], -1).astype(np.float64) for a in (reference, quantized))
    return np.stack([e, q - e])
