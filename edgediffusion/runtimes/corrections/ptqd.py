"""PTQD: He et al. 2023 (2305.10657), sections 3.2 and 3.3, as its released code has it.

The error of a prediction is d = k e + b + r: a part that goes with the float prediction e, a bias, and what is left, which
is taken for independent noise. The first two are undone, e = (q - b) / (1 + k); for the third, r / (1 + k), a sampler
that adds noise adds less of it. k is one number per step and used only where it is positive; b is per channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgediffusion.runtimes.corrections import Parameters, Terms
from edgediffusion.runtimes.corrections._moments import Moments


@dataclass(frozen=True)
class Method:
    OUTLIERS: ClassVar[float | None] = None
    DRIFT: ClassVar[bool] = False

    def fit(self, moments: Moments) -> dict[str, np.ndarray]:
        """k [steps], b [steps, channels], sigma [steps]: the channels' mean standard deviation of r."""
        whole, each = moments.pooled().covariance[:, 0], moments.covariance
        variance = whole[:, 0, 0]
        slope = np.divide(whole[:, 0, 1], variance, out=np.zeros_like(variance), where=variance > 0)
        k = np.maximum(slope, 0.0)
        at = k[:, None]
        b = moments.mean[..., 1] - at * moments.mean[..., 0]
        r = each[..., 1, 1] - 2 * at * each[..., 0, 1] + at * at * each[..., 0, 0]
        return {"k": k, "b": b, "sigma": np.sqrt(np.maximum(r, 0.0)).mean(axis=1)}

    def terms(self, parameters: Parameters) -> Terms:
        k, b, sigma = (parameters[name] for name in ("k", "b", "sigma"))
        scale = 1.0 / (1.0 + k[:, None])
        return Terms(scale, -b * scale, residual=sigma[:, None] * scale)
