"""Which layers stay float: what each one's int8 form costs in error and gains in time, and the choice between the two.

Errors of layers are taken as independent: their squares add. Times of layers are taken as if each stood alone. Both are
assumptions, so every choice is measured before it is told (``sensitivity``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

SIGNIFICANT = 2.0  # standard errors: a difference of times below that is noise
UGLY_DB = 1.0  # a layer that alone is worth so much of the whole error stays float by default
_SMALLEST_MS = 1e-6


@dataclass(frozen=True)
class LayerCost:
    """One layer that a recipe quantizes.

    ``error`` is the change of the guided prediction when this layer alone is quantized, over the prediction (root mean squares).
    Times are milliseconds of the layer's own nodes in a step, medians, with Q/DQ and changes of layout; ``noise_ms`` is the
    standard error of their difference. They are None where the engine ran no node that can be told to be the layer's.
    """

    name: str
    error: float
    float_ms: float | None = None
    quantized_ms: float | None = None
    noise_ms: float = 0.0

    @property
    def lost_ms(self) -> float:
        """What a step loses when the layer stays float; negative where it gains."""
        return 0.0 if self.float_ms is None or self.quantized_ms is None else self.float_ms - self.quantized_ms

    @property
    def is_slower(self) -> bool:
        """Whether int8 is slower there than float, beyond noise."""
        return -self.lost_ms > SIGNIFICANT * self.noise_ms and self.lost_ms < 0


@dataclass(frozen=True)
class Steps:
    """Milliseconds of a whole step, float and with every layer of the recipe quantized: of all nodes, as layers' times are."""

    float_ms: float
    quantized_ms: float


def predicted_error(layers: Sequence[LayerCost], kept: Collection[str]) -> float:
    """Of the guided prediction, relative, when the layers ``kept`` are float."""
    return math.sqrt(sum(layer.error**2 for layer in layers if layer.name not in kept))


def predicted_ratio(layers: Sequence[LayerCost], kept: Collection[str], steps: Steps) -> float:
    """Time of a step over that of the float one when the layers ``kept`` are float."""
    return (steps.quantized_ms + sum(layer.lost_ms for layer in layers if layer.name in kept)) / steps.float_ms


def share(layer: LayerCost, layers: Sequence[LayerCost]) -> float:
    """Of the squared error of all layers, 0..1."""
    total = sum(other.error**2 for other in layers)
    return layer.error**2 / total if total else 0.0


def is_ugly(layer: LayerCost, layers: Sequence[LayerCost]) -> bool:
    """Whether the whole error would be ``UGLY_DB`` smaller with this layer float: 10 log10(1 / (1 - share)) >= UGLY_DB."""
    return share(layer, layers) >= 1 - 10 ** (-UGLY_DB / 10)


def ranking(layers: Sequence[LayerCost]) -> tuple[LayerCost, ...]:
    """The order in which layers become float: the first k of it are what to keep float for the best of k.

    First those that int8 makes slower, the slowest before the others: they cost nothing. Then by squared error for each
    millisecond that is lost, which is the greedy solution of the knapsack. A loss below its noise counts as the noise.
    """
    slower = sorted((layer for layer in layers if layer.is_slower), key=lambda layer: (layer.lost_ms, layer.name))
    others = [layer for layer in layers if not layer.is_slower]
    worth = {layer.name: layer.error**2 / max(layer.lost_ms, layer.noise_ms, _SMALLEST_MS) for layer in others}
    return (*slower, *sorted(others, key=lambda layer: (-worth[layer.name], layer.name)))


def first_that_holds(holds: Callable[[int], bool], low: int, high: int) -> int | None:
    """The smallest of ``low`` .. ``high`` that holds, where all after one that holds do; None if ``high`` does not.

    ``high`` is tried first, so that what cannot be reached is known after one measurement.
    """
    if low > high or not holds(high):
        return None
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return high
