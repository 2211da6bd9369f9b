"""From the two predictions of classifier-free guidance to one, where to guide at all, and thresholds of the estimate of x_0."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgediffusion.errors import ArgumentError
from edgediffusion.runtimes.schedules import Point

Threshold = Callable[[np.ndarray], np.ndarray]  # of an estimate of x_0, float32 [images, ...]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho and Salimans 2022, 2207.12598), in diffusers' parametrization: 1 is none.

    ``rescale`` is phi of Lin et al. 2023 (2305.08891, section 3.4): how much of the guided prediction is brought back to
    the standard deviation of the conditional one; 0 leaves it alone. ``interval`` are the noise levels sigma / alpha
    between which guidance is on, the lower one excluded (Kynkaanniemi et al. 2024, 2404.07724, equation 5).
    """

    scale: float
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, math.inf)

    def is_on(self, at: Point) -> bool:
        """Whether there is anything to guide at this point; elsewhere the conditional prediction is taken as it is."""
        low, high = self.interval
        level = at.sigma / at.alpha if at.alpha > 0 else math.inf
        return low < level <= high

    def __call__(self, output: np.ndarray) -> np.ndarray:
        """float32 [2 images, ...], the unconditional rows first -> [images, ...]: u + scale (c - u), then rescaled."""
        images = len(output) // 2
        unconditional, conditional = output[:images], output[images:]
        guided: np.ndarray = unconditional + self.scale * (conditional - unconditional)
        if self.rescale == 0:
            return guided
        # Equations 15 and 16; one factor for each image. A prediction without any spread has none to bring back.
        axes = tuple(range(1, guided.ndim))
        spread = guided.std(axis=axes, keepdims=True)
        factor = np.divide(conditional.std(axis=axes, keepdims=True), spread, out=np.ones_like(spread), where=spread > 0)
        guided *= self.rescale * factor + (1.0 - self.rescale)
        return guided


@dataclass(frozen=True)
class DynamicThreshold:
    """Saharia et al. 2022 (2205.11487, section 2.3): for networks whose data lie in -1..1, which latents mostly do not.

    s is the ``quantile`` of the absolute values of an image's x_0, but at least 1 and at most ``most``, where diffusers'
    ``sample_max_value`` is 1 and the paper has no such bound; x_0 is clipped to -s..s and divided by s.
    """

    quantile: float = 0.995
    most: float = math.inf

    def __call__(self, x0: np.ndarray) -> np.ndarray:
        """float32 [images, ...] -> the same shape, within -1..1."""
        axes = tuple(range(1, x0.ndim))
        s = np.clip(np.quantile(np.abs(x0), self.quantile, axis=axes, keepdims=True), 1.0, self.most).astype(np.float32)
        within: np.ndarray = np.clip(x0, -s, s) / s
        return within


@dataclass(frozen=True)
class Clip:
    """x_0 kept within -``most``..``most``: diffusers' ``clip_sample``, for networks that draw pixels (Ho et al. 2020, 2006.11239)."""

    most: float

    def __call__(self, x0: np.ndarray) -> np.ndarray:
        """float32 [images, ...] -> the same shape."""
        within: np.ndarray = np.clip(x0, np.float32(-self.most), np.float32(self.most))
        return within


def guidance(scale: float, *, rescale: float = 0.0, interval: Sequence[float] | None = None) -> Guidance:
    """Guidance from what a request says.

    Raises:
        ArgumentError: a number that cannot be used.
    """
    if not math.isfinite(scale):
        raise ArgumentError("The guidance scale cannot be used", got=scale, allowed="a finite number; 1 is no guidance")
    if not 0 <= rescale <= 1:
        raise ArgumentError("The rescaling of guidance cannot be used", got=rescale, allowed="0 (off) to 1; its authors use 0.7")
    if interval is None:
        return Guidance(scale, rescale)
    if len(interval) != 2 or not 0 <= interval[0] < interval[1]:
        raise ArgumentError(
            "The interval of guidance cannot be used",
            got=", ".join(f"{level:g}" for level in interval) or "nothing",
            allowed="two levels of noise, sigma / alpha: the lower one, 0 or more, then the upper one",
        )
    return Guidance(scale, rescale, (float(interval[0]), float(interval[1])))


def dynamic_threshold(values: Sequence[float]) -> DynamicThreshold:
    """The threshold from what a request says: the quantile, and how large s may become.

    Raises:
        ArgumentError: a number that cannot be used.
    """
    quantile, most = (*values, math.inf)[:2] if len(values) in (1, 2) else (math.nan, math.nan)
    if not (0 < quantile <= 1 and most >= 1):
        raise ArgumentError(
            "The dynamic threshold cannot be used",
            got=", ".join(f"{value:g}" for value in values) or "nothing",
            allowed="a quantile above 0 and up to 1, and if wanted the largest s, 1 or more",
        )
    return DynamicThreshold(float(quantile), float(most))
