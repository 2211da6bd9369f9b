"""DeepCache with full calls where the picture changes: ours, there is no canonical one.

The skip tensor beside the cached feature is computed afresh at every call. While it differs from that of the last full call by
less than ``threshold`` (mean absolute difference over mean absolute value, the measure of first-block caching), the feature
serves on, for ``most`` calls at the most. Where it differs by more, the shallow run that told so was in vain; with ``ahead``
its answer is taken all the same, and the next call is a full one.

The decision is for the call as a whole: a picture depends on what is drawn with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edgediffusion.bundle import Bundle, Component
from edgediffusion.runtimes.caching._change import relative_change
from edgediffusion.runtimes.caching._cuts import Skip, skip
from edgediffusion.runtimes.network import Call, Joined, Network
from edgediffusion.runtimes.options import check_range


@dataclass(frozen=True)
class Policy:
    threshold: float = 0.1
    most: int = 8
    ahead: bool = False
    cut: str = ""

    def __post_init__(self) -> None:
        check_range("threshold", self.threshold, 0, math.inf)
        check_range("most", self.most, 0, 1000)

    def components(self, bundle: Bundle) -> tuple[Component, ...]:
        return skip(bundle, self.cut)

    def start(self, graphs: Joined, calls: int) -> Network:
        unet, kept, age, changed = Skip(graphs), np.empty(0), 0, False

        def ask(call: Call) -> np.ndarray:
            nonlocal kept, age, changed
            if kept.size and age < self.most and not changed:
                answer = unet.shallow(call)
                changed = relative_change(unet.indicator, kept) >= self.threshold
                if self.ahead or not changed:
                    age += 1
                    return answer
            answer = unet.whole(call)
            kept, age, changed = unet.indicator.copy(), 0, False
            return answer

        return ask
