"""QNCD's runtime noise estimation: Chu et al. 2024 (2403.20137), inter-step part. Nothing is measured beforehand.

Every ``every`` steps the state is taken back to the noise level of the step before with fresh noise e, the network is
asked about it, and the mean of (its epsilon - e) is taken for its bias, which is subtracted until the next estimate. That
is one more call of the network in ``every`` steps; the first estimate is made at the second step, the first that has one
before it. The released code sets the estimate of the deviation to zero, so there is none here.

The mean is over one picture, so that a picture does not depend on its batch. It is a noisy estimate: even a perfect
network's epsilon holds the noise that was in the state already, whose mean over n numbers is about 1 / sqrt(n). Taken back
to pure noise, as at the second step of a flow, it finds zero.

The intra-step part, a smoothing of the time embedding's channels, is a rewrite of the graph and not here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edgediffusion.errors import ArgumentError
from edgediffusion.runtimes.corrections import Corrector, Run
from edgediffusion.runtimes.denoiser import epsilon_gain, to_epsilon


@dataclass(frozen=True)
class Method:
    every: int = 10

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ArgumentError("qncd estimates the noise every few steps", got=self.every, allowed="1 and more")

    def start(self, run: Run) -> Corrector:
        return _Estimator(run, self.every)


class _Estimator(Corrector):
    def __init__(self, run: Run, every: int):
        self._run, self._every = run, every
        self._bias: np.ndarray | None = None  # float32 [images, 1, ...], of epsilon

    def prediction(self, output: np.ndarray, x: np.ndarray, i: int) -> None:
        if i > 0 and (i - 1) % self._every == 0:
            self._bias = self._estimate(x, i)
        if self._bias is not None:
            output -= self._bias / np.float32(epsilon_gain(self._run.prediction, self._run.points.at[i]))

    def _estimate(self, x: np.ndarray, i: int) -> np.ndarray:
        at, before = self._run.points.at[i], self._run.points.at[i - 1]
        ratio = before.alpha / at.alpha
        e = self._run.noise.normal(x.shape)
        noisier = ratio * x + math.sqrt(before.sigma**2 - (ratio * at.sigma) ** 2) * e
        found = to_epsilon(self._run.prediction, noisier, self._run.predict(noisier, before), before)
        bias: np.ndarray = (found - e).mean(axis=tuple(range(1, x.ndim)), keepdims=True)
        return bias
