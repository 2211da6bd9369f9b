"""FORA for transformers: Selvaraju et al. 2024 (2407.01425). Every N-th call and the last compute, the others reuse.

The authors reuse the outputs of each block's attention and feed-forward layers, under the present gates. Here it is the
residual, what all blocks behind the cut added together: the gates are those of the last full call, and a call that reuses
runs nothing but the embeddings and the output layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgediffusion.bundle import Bundle, Component
from edgediffusion.runtimes.caching._cuts import Blocks, blocks
from edgediffusion.runtimes.network import Call, Joined, Network
from edgediffusion.runtimes.options import check_range


@dataclass(frozen=True)
class Policy:
    """``cut`` is the first one of the bundle by default."""

    interval: int = 3
    cut: str = ""

    def __post_init__(self) -> None:
        check_range("interval", self.interval, 1, 1000)

    def components(self, bundle: Bundle) -> tuple[Component, ...]:
        return blocks(bundle, self.cut)

    def start(self, graphs: Joined, calls: int) -> Network:
        transformer, kept = Blocks(graphs), False

        def ask(call: Call) -> np.ndarray:
            nonlocal kept
            transformer.head(call)
            if kept and call.number % self.interval != 0 and call.number != calls - 1:
                return transformer.shallow()
            kept = True
            return transformer.tail(call)

        return ask
