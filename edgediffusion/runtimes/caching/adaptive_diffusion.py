"""AdaptiveDiffusion for any network: Ye et al. 2024 (2410.09873). Where the path is smooth, the last prediction serves again.

Of the states x that the network was asked about, the third difference tells how far the path is from a parabola:

    | x_t - 3 x_(t-1) + 3 x_(t-2) - x_(t-3) | / | x_t |

Below ``threshold`` the whole prediction is reused, at most ``most`` calls in a row. The first three calls have no third difference
and compute. No graph is cut: a call that reuses runs nothing at all.

The decision is for the call as a whole: a picture depends on what is drawn with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edgediffusion.bundle import Bundle, Component
from edgediffusion.runtimes.caching._cuts import Whole, whole
from edgediffusion.runtimes.network import PREDICTION, Call, Joined, Network
from edgediffusion.runtimes.options import check_range


@dataclass(frozen=True)
class Policy:
    threshold: float = 0.05
    most: int = 3

    def __post_init__(self) -> None:
        check_range("threshold", self.threshold, 0, math.inf)
        check_range("most", self.most, 0, 1000)

    def components(self, bundle: Bundle) -> tuple[Component, ...]:
        return whole(bundle)

    def start(self, graphs: Joined, calls: int) -> Network:
        network = Whole(graphs)
        states: list[np.ndarray] = []  # the last three, the latest first
        age = 0

        def ask(call: Call) -> np.ndarray:
            nonlocal states, age
            smooth = len(states) == 3 and third_difference(call.sample, *states) < self.threshold
            states = [call.sample.copy(), *states[:2]]
            if smooth and age < self.most:
                age += 1
                return graphs.arrays[PREDICTION]
            age = 0
            return network.whole(call)

        return ask


def third_difference(x: np.ndarray, x1: np.ndarray, x2: np.ndarray, x3: np.ndarray) -> float:
    """|x - 3 x1 + 3 x2 - x3| / |x|, Euclidean norms over all images; infinite for a state of zeros."""
    size = float(np.linalg.norm(x))
    return float(np.linalg.norm(x - 3 * x1 + 3 * x2 - x3)) / size if size > 0 else math.inf
