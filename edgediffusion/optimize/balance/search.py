"""The balance with the least expected error of the layers' outputs; this project's own method.

With rounding errors uniform and independent (Widrow 1956), a tensor of step d adds noise of variance d^2 / 12 a value:

* activations, step s in x / f:    sum_c (s f_c)^2 / 12 * sum_o,k w_ock^2
* weights, step d_o in f w:        sum_o d_o^2 / 12 * sum_c,k E[x_c^2] / f_c^2

Both are computed from the statistics alone. Candidates: no balancing, and max|x|^a / max|w|^(1 - a) and max|x|^a for
a = 0.1, 0.2, ..., 1. The first covers SmoothQuant's and AWQ's searches without running the network for each candidate.

Weights of few bits are cut where that has the least squared error, and their step is not that of their largest value. To know that here
changes nothing that could be measured (docs/quantization-methods.md).

Factors cost a multiplication at run time. Where both sides have 8 bits or more, they are taken where they halve the error; below
that every decibel counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edgediffusion.optimize.balance import balanced, input_amax, weight_amax
from edgediffusion.optimize.observed import Observed

WORTH, EIGHT = 0.5, 8


@dataclass(frozen=True)
class Sums:
    """What the error asks of a layer's weight: ``squares`` [in] over outputs and kernel, ``largest`` |w| [out, in] over the kernel."""

    squares: np.ndarray
    largest: np.ndarray
    kernel: int

    @classmethod
    def of(cls, layer: Observed) -> Sums:
        w = layer.weight.reshape(*layer.weight.shape[:2], -1)
        squares = sum((row.astype(np.float64) ** 2).sum(1) for row in w)  # by output: in float64 a large weight is larger still
        return cls(np.asarray(squares), np.abs(w).max(2), w.shape[2])


def factors(layers: Sequence[Observed], bits: tuple[int, int]) -> np.ndarray:
    known = [Sums.of(layer) for layer in layers]  # once: there are 21 candidates, and weights may be read from a file each time

    def error(f: np.ndarray) -> float:
        return sum(expected_error(layer, f, bits, sums) for layer, sums in zip(layers, known, strict=True))

    errors = [(error(f), f) for f in _candidates(layers)]
    (before, none), (least, best) = errors[0], min(errors, key=lambda pair: pair[0])
    return none if min(bits) >= EIGHT and least > WORTH * before else best


def expected_error(layer: Observed, f: np.ndarray, bits: tuple[int, int], sums: Sums | None = None) -> float:
    """Variance that rounding adds to the layer's output, summed over its channels, for one position."""
    if layer.groups > 1:  # a depthwise weight has one input channel for each output
        return 0.0
    sums = sums or Sums.of(layer)
    weight_bits, activation_bits = bits
    wide = f.astype(np.float64)
    low, high = (layer.input.low / wide).min(), (layer.input.high / wide).max()
    s = (max(high, 0) - min(low, 0)) / (2**activation_bits - 1)
    from_activations = ((s * wide) ** 2 * sums.squares).sum() / 12
    d = (sums.largest * wide).max(1) / (2 ** (weight_bits - 1) - 1)
    from_weights = (d**2).sum() * (layer.input.mean_square / wide**2).sum() * sums.kernel / 12
    return float(from_activations + from_weights)


def _candidates(layers: Sequence[Observed]) -> Iterator[np.ndarray]:
    x, w = input_amax(layers), weight_amax(layers)
    yield np.ones(len(x), np.float32)  # the first is of no balancing
    for alpha in np.linspace(0.1, 1, 10):
        yield balanced(x, w, float(alpha))
        yield balanced(x, np.where(w > 0, 1.0, 0.0), float(alpha))
