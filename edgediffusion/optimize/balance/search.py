"""The balance with the least expected error of the layers' outputs; this project's own method.

With rounding errors uniform and independent (Widrow 1956), a tensor of step d adds noise of variance d^2 / 12 a value:

* activations, step s in x / f:    sum_c (s f_c)^2 / 12 * sum_o,k w_ock^2
* weights, step d_o in f w:        sum_o d_o^2 / 12 * sum_c,k E[x_c^2] / f_c^2

Both are computed from the statistics alone. Weights of few bits are cut where that has the least squared error (``ranges = "mse"``), and
their step is not that of their largest value; then the second term is what rounding and cutting really do to some of their outputs:

* sum_o,c,k E[x_c^2] / f_c^2 (f_c w_ock - read(f_c w_ock))^2, with the best of a few ranges for each o

Activations of few bits are cut too, by how much their statistics do not tell. Then both terms are left as they are: too large alike.

Candidates: no balancing, and with x and w the largest of each channel, or their root mean squares, x^a / w^(1 - a) and, of the largest,
x^a for a = 0.1, 0.2, ..., 1. They cover SmoothQuant's and AWQ's searches without running the network for each.

Factors cost a multiplication at run time. Where both sides have 8 bits or more, they are taken where they save an error of more than
50 dB below the layers' outputs; below that every decibel counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edgediffusion.optimize.balance import balanced, input_amax, weight_amax
from edgediffusion.optimize.integers import LOW_BITS
from edgediffusion.optimize.observed import Observed

WORTH, EIGHT = 1e-5, 8
OUTPUTS = 16  # of a layer's weight, that stand for all where each candidate is rounded
CUTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)


@dataclass(frozen=True)
class Sums:
    """What the error asks of a layer's weight: ``squares`` [in] over outputs and kernel, ``largest`` |w| [out, in] over the kernel.

    ``some`` [outputs, in, kernel] are weights of spread outputs, which are ``part`` of all.
    """

    squares: np.ndarray
    largest: np.ndarray
    kernel: int
    some: np.ndarray
    part: float

    @classmethod
    def of(cls, layer: Observed) -> Sums:
        w = layer.weight.reshape(*layer.weight.shape[:2], -1)
        squares = sum((row.astype(np.float64) ** 2).sum(1) for row in w)  # by output: in float64 a large weight is larger still
        some = w[np.unique(np.linspace(0, len(w) - 1, OUTPUTS).astype(int))]
        return cls(np.asarray(squares), np.abs(w).max(2), w.shape[2], some, len(some) / len(w))


def factors(layers: Sequence[Observed], bits: tuple[int, int], *, cut: bool = False) -> np.ndarray:
    known = [Sums.of(layer) for layer in layers]  # once: there are 21 candidates, and weights may be read from a file each time

    def error(f: np.ndarray) -> float:
        return sum(expected_error(layer, f, bits, sums, cut=cut) for layer, sums in zip(layers, known, strict=True))

    errors = [(error(f), f) for f in _candidates(layers, known)]
    (before, none), (least, best) = errors[0], min(errors, key=lambda pair: pair[0])
    power = sum(float(layer.output.mean_square.sum()) for layer in layers)
    return none if min(bits) >= EIGHT and before - least < WORTH * power else best


def expected_error(layer: Observed, f: np.ndarray, bits: tuple[int, int], sums: Sums | None = None, *, cut: bool = False) -> float:
    """Variance that quantizing adds to the layer's output, summed over its channels, for one position.

    With ``cut``, weights of few bits are cut where that has the least squared error; this counts beside activations of more bits.
    """
    if layer.groups > 1:  # a depthwise weight has one input channel for each output
        return 0.0
    sums = sums or Sums.of(layer)
    weight_bits, activation_bits = bits
    wide, from_activations = f.astype(np.float64), 0.0
    if activation_bits < 16:
        low, high = (layer.input.low / wide).min(), (layer.input.high / wide).max()
        s = (max(high, 0) - min(low, 0)) / (2**activation_bits - 1)
        from_activations = ((s * wide) ** 2 * sums.squares).sum() / 12
    if cut and weight_bits <= LOW_BITS < activation_bits:
        return float(from_activations + _cut_error(sums.some, f, layer.input.mean_square, weight_bits) / sums.part)
    d = (sums.largest * wide).max(1) / (2 ** (weight_bits - 1) - 1)
    from_weights = (d**2).sum() * (layer.input.mean_square / wide**2).sum() * sums.kernel / 12
    return float(from_activations + from_weights)


def _cut_error(weight: np.ndarray, f: np.ndarray, mean_square: np.ndarray, bits: int) -> float:
    """sum E[x^2] / f^2 (f w - read(f w))^2 of a weight [out, in, kernel], each output cut at the best of ``CUTS``."""
    balanced_weight = weight * f[:, None]
    counts = (mean_square / f.astype(np.float64) ** 2)[:, None].astype(np.float32)
    largest = np.maximum(np.abs(balanced_weight).max((1, 2), keepdims=True), np.finfo(np.float32).tiny)
    top = 2 ** (bits - 1) - 1
    errors = []
    for cut in CUTS:
        step = largest * np.float32(cut / top)
        lost = balanced_weight - np.clip(np.rint(balanced_weight / step), -top, top) * step
        errors.append((counts * lost**2).sum((1, 2), dtype=np.float64))
    return float(np.min(errors, axis=0).sum())


def _candidates(layers: Sequence[Observed], known: Sequence[Sums]) -> Iterator[np.ndarray]:
    x, w = input_amax(layers), weight_amax(layers)
    x_rms = np.sqrt(layers[0].input.mean_square)
    w_rms = np.sqrt(np.stack([sums.squares / (len(sums.largest) * sums.kernel) for sums in known]).mean(0))
    yield np.ones(len(x), np.float32)  # the first is of no balancing
    for alpha in np.linspace(0.1, 1, 10):
        yield balanced(x, w, float(alpha))
        yield balanced(x, np.where(w > 0, 1.0, 0.0), float(alpha))
        yield balanced(x_rms, w_rms, float(alpha))
