"""TeaCache for transformers: Liu et al. 2024 (2411.19108). The change of the modulated input stands for that of the output.

The input of the first block, normalized, scaled and shifted by the time embedding, is compared with that of the call before:
d = mean |m - m'| / mean |m'|. A polynomial fitted for the network turns d into an expected change of the output; these
are added up, and while the sum is below ``threshold`` the residual of all blocks is reused. A call that computes starts the
sum anew. The first and the last call always compute.

``polynomial`` are its coefficients from the highest power on, "a/b/c"; ``identity`` is 1/0, and ``flux`` the authors' for that
model. ``edgediffusion tune-cache`` fits one. A fit may dip below zero where it saw nothing, which counts as no change.

The decision is for the call as a whole: a picture depends on what is drawn with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edgediffusion.bundle import Bundle, Component
from edgediffusion.runtimes.caching._change import relative_change
from edgediffusion.runtimes.caching._cuts import Blocks, blocks, is_first, refuse_cut
from edgediffusion.runtimes.caching._numbers import numbers
from edgediffusion.runtimes.network import Call, Joined, Network
from edgediffusion.runtimes.options import check_range

POLYNOMIALS = {
    "identity": (1.0, 0.0),
    "flux": (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
}


@dataclass(frozen=True)
class Policy:
    threshold: float = 0.2
    polynomial: str = "identity"
    cut: str = ""

    def __post_init__(self) -> None:
        check_range("threshold", self.threshold, 0, math.inf)
        if self.polynomial not in POLYNOMIALS:
            numbers("polynomial", self.polynomial, ", ".join(POLYNOMIALS))
        if self.cut and not is_first(self.cut):
            refuse_cut("teacache", self.cut, "the cut before the first block, such as transformer_blocks.0")

    @property
    def coefficients(self) -> tuple[float, ...]:
        """From the highest power on."""
        return POLYNOMIALS.get(self.polynomial) or numbers("polynomial", self.polynomial)

    def components(self, bundle: Bundle) -> tuple[Component, ...]:
        found = blocks(bundle, self.cut)
        if not is_first(str(found[0].cut)):
            refuse_cut("teacache", str(found[0].cut), "the cut before the first block: export with --cut transformer_blocks.0")
        return found

    def start(self, graphs: Joined, calls: int) -> Network:
        transformer, before, total = Blocks(graphs), np.empty(0), 0.0

        def ask(call: Call) -> np.ndarray:
            nonlocal before, total
            transformer.head(call)
            expected = self.expected(relative_change(transformer.indicator, before)) if before.size else math.inf
            before = transformer.indicator.copy()
            total += expected
            if total < self.threshold and call.number != calls - 1:
                return transformer.shallow()
            total = 0.0
            return transformer.tail(call)

        return ask

    def expected(self, change: float) -> float:
        """The expected relative change of the output at a relative change of the modulated input."""
        return max(0.0, float(np.polyval(self.coefficients, change)))
