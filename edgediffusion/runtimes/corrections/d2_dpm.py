"""D2-DPM: Zeng et al. 2025 (2501.08180), as its released code has it.

The quantized prediction q and its error d are taken for jointly normal; outliers beyond four standard deviations are left
out. Given q, d is normal with mean mu_c = mu_d + rho (sigma_d / sigma_q) (q - mu_q) and deviation
sigma_c = sigma_d sqrt(1 - rho^2), |rho| at most 0.9999.

``mode`` 1. ``deterministic`` (D-D2): mu_c is subtracted, and a sampler that adds noise adds that much less of it.
         2. ``stochastic`` (S-D2): a draw from that law is subtracted, whatever the sampler.
``granularity``: one law for the whole ``tensor`` of a step, or one for each ``channel``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgediffusion.errors import ArgumentError
from edgediffusion.runtimes.corrections import Parameters, Terms
from edgediffusion.runtimes.corrections._moments import Moments

_LARGEST_RHO = 0.9999


@dataclass(frozen=True)
class Method:
    OUTLIERS: ClassVar[float | None] = 4.0
    DRIFT: ClassVar[bool] = False

    mode: str = "deterministic"
    granularity: str = "channel"

    def __post_init__(self) -> None:
        for name, allowed in (("mode", ("deterministic", "stochastic")), ("granularity", ("tensor", "channel"))):
            if getattr(self, name) not in allowed:
                raise ArgumentError(f"d2-dpm has no such {name}", got=repr(getattr(self, name)), allowed=", ".join(allowed))

    def fit(self, moments: Moments) -> dict[str, np.ndarray]:
        """mu_q, sigma_q, mu_d, sigma_d and rho, each [steps, channels], or [steps, 1] for the whole tensor."""
        chosen = moments.pooled() if self.granularity == "tensor" else moments
        mean, c = chosen.mean, chosen.covariance
        sigma_q = np.sqrt(np.maximum(c[..., 0, 0] + 2 * c[..., 0, 1] + c[..., 1, 1], 0.0))
        sigma_d = np.sqrt(c[..., 1, 1])
        product = sigma_q * sigma_d
        rho = np.divide(c[..., 0, 1] + c[..., 1, 1], product, out=np.zeros_like(product), where=product > 0)
        return {
            "mu_q": mean[..., 0] + mean[..., 1],
            "sigma_q": sigma_q,
            "mu_d": mean[..., 1],
            "sigma_d": sigma_d,
            "rho": np.clip(rho, -_LARGEST_RHO, _LARGEST_RHO),
        }

    def terms(self, parameters: Parameters) -> Terms:
        mu_q, sigma_q, mu_d, sigma_d, rho = (parameters[name] for name in ("mu_q", "sigma_q", "mu_d", "sigma_d", "rho"))
        slope = np.divide(rho * sigma_d, sigma_q, out=np.zeros_like(sigma_q), where=sigma_q > 0)
        sigma_c = sigma_d * np.sqrt(1.0 - rho * rho)
        scale, shift = 1.0 - slope, slope * mu_q - mu_d
        if self.mode == "stochastic":
            return Terms(scale, shift, spread=sigma_c)
        return Terms(scale, shift, residual=sigma_c)
