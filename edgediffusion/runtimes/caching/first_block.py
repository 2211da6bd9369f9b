"""First-block caching for transformers, as in ParaAttention and diffusers' ``FirstBlockCacheConfig``.

The blocks before the cut run at every call, one block if it was cut at the second. What they add to the stream, r, is compared
with what they added at the last full call: while mean |r - r'| / mean |r'| is below ``threshold``, the residual of the
other blocks is reused. (diffusers reuses at equality too; here a threshold of 0 reuses nothing.)

The decision is for the call as a whole: a picture depends on what is drawn with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edgediffusion.bundle import Bundle, Component
from edgediffusion.runtimes.caching._change import relative_change
from edgediffusion.runtimes.caching._cuts import Blocks, blocks, inner_cuts, is_first, refuse_cut
from edgediffusion.runtimes.network import Call, Joined, Network
from edgediffusion.runtimes.options import check_range


@dataclass(frozen=True)
class Policy:
    """``cut`` is the first one behind a block by default."""

    threshold: float = 0.05
    cut: str = ""

    def __post_init__(self) -> None:
        check_range("threshold", self.threshold, 0, math.inf)
        if self.cut and is_first(self.cut):
            refuse_cut("first-block", self.cut, "cuts behind the first block, such as transformer_blocks.1")

    def components(self, bundle: Bundle) -> tuple[Component, ...]:
        return blocks(bundle, self.cut or inner_cuts(bundle)[0])

    def start(self, graphs: Joined, calls: int) -> Network:
        transformer, kept = Blocks(graphs), np.empty(0)

        def ask(call: Call) -> np.ndarray:
            nonlocal kept
            transformer.head(call)
            if kept.size and relative_change(transformer.indicator, kept) < self.threshold:
                return transformer.shallow()
            kept = transformer.indicator.copy()
            return transformer.tail(call)

        return ask
