"""Timestep-aware correction, after TAC-Diffusion: Yao et al. 2024 (2407.03917). NOT verified against the authors' code.

Two parts, each per step and channel:

1. Noise estimation reconstruction: the prediction is multiplied by K = sum(e q) / sum(q^2), the least-squares factor. The
   paper's loss weighs the elements by a mask that we do not know in detail; here every element counts the same.
2. Input bias correction: B, the mean distance of the quantized trajectory to the float one, both from the same noise, is
   added to the state before each step. B of a step is measured with the corrections of all steps before it at work. The
   paper averages over a mini-batch; here a channel's elements are averaged too, so that B serves every size.

Do not expect the paper's numbers of it.
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
    DRIFT: ClassVar[bool] = True

    def fit(self, moments: Moments) -> dict[str, np.ndarray]:
        """K [steps, channels]. B, named ``drift``, is measured afterwards, with K at work."""
        e, d = moments.mean[..., 0], moments.mean[..., 1]
        c = moments.covariance
        product = c[..., 0, 0] + c[..., 0, 1] + e * (e + d)
        square = c[..., 0, 0] + 2 * c[..., 0, 1] + c[..., 1, 1] + (e + d) ** 2
        return {"K": np.divide(product, square, out=np.ones_like(square), where=square > 0)}

    def terms(self, parameters: Parameters) -> Terms:
        return Terms(parameters["K"], np.zeros_like(parameters["K"]), drift=parameters.get("drift"))
