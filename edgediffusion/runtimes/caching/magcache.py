"""MagCache for transformers: Ma et al. 2025 (2506.09045), as diffusers' ``MagCacheConfig`` has it.

The residual's size changes from call to call by factors that hardly depend on the prompt: ``ratios``, one for each call of a
picture, measured once (``edgediffusion tune-cache``); for another number of calls the nearest ones are taken. Since the last
full call, the product of the factors says how wrong the kept residual has become; the errors |1 - product| of the calls in
between are added up, and while the sum is below ``threshold`` the residual is reused, at most ``most`` calls long. The
first ``retention`` of all calls compute.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edgediffusion.bundle import Bundle, Component
from edgediffusion.errors import ArgumentError
from edgediffusion.runtimes.caching._cuts import Blocks, blocks
from edgediffusion.runtimes.caching._numbers import numbers
from edgediffusion.runtimes.network import Call, Joined, Network
from edgediffusion.runtimes.options import check_range


@dataclass(frozen=True)
class Policy:
    threshold: float = 0.06
    most: int = 3
    retention: float = 0.2
    ratios: str = ""
    cut: str = ""

    def __post_init__(self) -> None:
        check_range("threshold", self.threshold, 0, math.inf)
        check_range("most", self.most, 0, 1000)
        check_range("retention", self.retention, 0, 1)
        if self.ratios:
            numbers("ratios", self.ratios)

    def components(self, bundle: Bundle) -> tuple[Component, ...]:
        if not self.ratios:
            raise ArgumentError(
                "The caching policy 'magcache' needs the ratios of this network",
                do="Measure them: edgediffusion tune-cache BUNDLE --prompts FILE; it prints the policy with them.",
            )
        return blocks(bundle, self.cut)

    def start(self, graphs: Joined, calls: int) -> Network:
        transformer, full, kept = Blocks(graphs), frozenset(self.full_calls(calls)), False

        def ask(call: Call) -> np.ndarray:
            nonlocal kept
            transformer.head(call)
            if kept and call.number not in full:
                return transformer.shallow()
            kept = True
            return transformer.tail(call)

        return ask

    def full_calls(self, calls: int) -> tuple[int, ...]:
        """The numbers of the calls that compute: nothing of a picture is looked at."""
        ratios = nearest(numbers("ratios", self.ratios), calls)
        full, product, error, age = [], 1.0, 0.0, 0
        for number, ratio in enumerate(ratios):
            product, age = product * ratio, age + 1
            error += abs(1.0 - product)
            if number == 0 or number < int(self.retention * calls + 0.5) or error >= self.threshold or age > self.most:
                full.append(number)
                product, error, age = 1.0, 0.0, 0
        return tuple(full)


def nearest(ratios: tuple[float, ...], calls: int) -> tuple[float, ...]:
    """As many values as there are calls, the nearest ones."""
    if calls == 1:
        return ratios[-1:]
    return tuple(ratios[int(np.round(i * (len(ratios) - 1) / (calls - 1)))] for i in range(calls))
