"""What a measured correction does in a generation, whatever its method."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from edgediffusion.runtimes.corrections import Corrector, Run, Terms
from edgediffusion.runtimes.denoiser import epsilon_gain
from edgediffusion.runtimes.noise import Noise


class Applied(Corrector):
    """Applies ``terms``; the network's prediction and the state are changed in place, nothing is allocated but noise."""

    def __init__(self, terms: Terms, run: Run):
        self._scale, self._shift = _broadcast(terms.scale), _broadcast(terms.shift)
        self._spread = None if terms.spread is None else _broadcast(terms.spread)
        self._drift = None if terms.drift is None else _broadcast(terms.drift)
        self._left = None if terms.residual is None else noise_left(terms.residual, run)
        self._run = run
        self._step = 0

    def prediction(self, output: np.ndarray, x: np.ndarray, i: int) -> None:
        self._step = i
        output *= self._scale[i]
        output += self._shift[i]
        if self._spread is not None:
            output -= self._spread[i] * self._run.noise.normal(output.shape)

    def state(self, x: np.ndarray, i: int) -> None:
        if self._drift is not None:
            x += self._drift[i]

    def noise(self, noise: Noise) -> Noise:
        return noise if self._left is None else _Less(noise, self)

    def less(self, values: np.ndarray) -> np.ndarray:
        """The noise of the step whose prediction was corrected last."""
        assert self._left is not None
        values *= self._left[self._step]
        return values


class _Less:
    """A stream of noise, each draw as much smaller as its step's corrected prediction is noisy already."""

    def __init__(self, noise: Noise, applied: Applied):
        self._noise, self._applied = noise, applied

    def normal(self, shape: Sequence[int]) -> np.ndarray:
        return self._applied.less(self._noise.normal(shape))


def noise_left(residual: np.ndarray, run: Run) -> np.ndarray | None:
    """The part of its noise that a sampler should still add, float32 [steps, channels or 1, 1, 1]; None if it adds none.

    A step adds noise of deviation s, and an error of epsilon enters the state times c (``noise_terms`` of a sampler):
    s^2 <- max(0, s^2 - c^2 sigma^2), the variance calibration of PTQD (2305.10657, section 3.3) and D2-DPM.
    """
    noise_terms = getattr(run.sampler, "noise_terms", None)
    if noise_terms is None:
        return None
    terms = [noise_terms(at, to) for at, to in run.points]
    if not any(s > 0 for s, _ in terms):
        return None
    part = np.ones_like(residual)
    for i, ((s, c), at) in enumerate(zip(terms, run.points.at, strict=True)):
        sigma = residual[i] * abs(epsilon_gain(run.prediction, at))
        if s > 0:
            part[i] = np.sqrt(calibrated(s * s, c, sigma)) / s
    return _broadcast(part)


def calibrated(variance: float, c: float, sigma: np.ndarray) -> np.ndarray:
    """max(0, variance - c^2 sigma^2): what noise a step must still add, where sigma of epsilon is there already."""
    assert math.isfinite(c)
    return np.maximum(0.0, variance - (c * sigma) ** 2)


def _broadcast(terms: np.ndarray) -> np.ndarray:
    """[steps, channels or 1] to float32 [steps, channels or 1, 1, 1]."""
    return terms.astype(np.float32).reshape(*terms.shape, 1, 1)
