"""Gaussians fitted to a judge's features, and the Fréchet distance between them, for many resamples at once.

Between N(m, S) and N(n, T) the squared distance is |m - n|^2 + tr S + tr T - 2 tr (S T)^(1/2): Dowson and Landau 1982,
"The Fréchet distance between multivariate normal distributions"; Heusel et al. 2017 (1706.08500), equation 6.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from edgediffusion.errors import ArgumentError


@dataclass(frozen=True)
class Gaussian:
    """``mean`` [features] and ``covariance`` [features, features], float64; ``items`` is how many pictures it was fitted to."""

    mean: np.ndarray
    covariance: np.ndarray
    items: int


def fit(features: np.ndarray) -> Gaussian:
    """The Gaussian of features [items, features]; the covariance is the unbiased one, as ``numpy.cov`` has it.

    Raises:
        ArgumentError: fewer than two items.
    """
    (gaussian,) = resampled(features, np.ones((1, len(features))))
    return gaussian


def resampled(features: np.ndarray, counts: np.ndarray) -> Iterator[Gaussian]:
    """A Gaussian for each row of ``counts`` [resamples, items], which says how often each item was taken."""
    items = len(features)
    if items < 2:
        raise ArgumentError("A Gaussian is fitted to at least two pictures", got=items)
    centre = features.mean(0, dtype=np.float64)  # subtracted first: what is left of the mean is small beside the spread
    apart = features.astype(np.float64) - centre
    for row in counts:
        mean = row @ apart / items
        covariance = ((apart * row[:, None]).T @ apart - items * np.outer(mean, mean)) / (items - 1)
        yield Gaussian(centre + mean, covariance, items)


def frechet(a: Gaussian, b: Gaussian, *, root_a: np.ndarray | None = None) -> float:
    """The squared Fréchet distance. ``root_a`` is ``root(a.covariance)``, for a caller who has it already.

    S T has the eigenvalues of the symmetric S^(1/2) T S^(1/2), which need no general matrix root: those that rounding
    makes negative are zero.
    """
    s = root(a.covariance) if root_a is None else root_a
    product = s @ b.covariance @ s
    between = np.sqrt(np.clip(np.linalg.eigvalsh((product + product.T) / 2), 0, None)).sum()
    distance = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance) + np.trace(b.covariance) - 2 * between
    return max(float(distance), 0.0)


def root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric square root of a symmetric matrix without negative eigenvalues but those of rounding."""
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray((vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T)


def centred(values: np.ndarray) -> np.ndarray:
    """Distances of resamples [1 + resamples], the first being that of the items themselves, without the resamples' own bias.

    A resample holds some items twice and lacks others, so it lies farther off than the items it was taken from: the whole
    spread would lie above the value whose uncertainty it should tell. It is moved until its mean is that value.
    """
    moved = values[1:] - (values[1:].mean() - values[0]) if len(values) > 1 else values[1:]
    return np.concatenate([values[:1], np.maximum(moved, 0.0)])
