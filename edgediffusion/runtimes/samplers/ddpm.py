"""Ancestral sampling: Ho et al. 2020 (2006.11239), algorithm 2, over any steps: the posterior of equation 7 between two points."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.options import check_choice
from edgediffusion.runtimes.samplers import Denoise
from edgediffusion.runtimes.schedules import Point, Points, alpha_bars, interpolated, is_ramp, require_kind, spaced, variance_preserving

ORDER = 0.0
KIND = "diffusion"


@dataclass(frozen=True)
class Options:
    """``variance`` of a step: the posterior's if x_0 is known (small), or that of the forward step (large); section 3.2."""

    variance: str = "small"

    def __post_init__(self) -> None:
        check_choice("variance", self.variance, ("small", "large"))


def points(schedule: NoiseSchedule, steps: int, options: Options = Options()) -> Points:
    """Whole training timesteps, or the levels of a ramp; the last step arrives at the clean picture."""
    require_kind(schedule, "ddpm", is_flow=False)
    if is_ramp(schedule):
        return interpolated(schedule, steps)
    bars = alpha_bars(schedule)
    return Points.chain(tuple(variance_preserving(bars, int(t)) for t in np.round(spaced(schedule, steps))))


def sample(denoise: Denoise, x: np.ndarray, points: Points, noise: Noise, options: Options = Options()) -> Iterator[np.ndarray]:
    for i, (at, to) in enumerate(points):
        x0 = denoise(x, i)
        kept, forward, deviation = _posterior(at, to, options)
        x = (to.alpha * forward / at.sigma**2) * x0 + (kept * to.sigma**2 / at.sigma**2) * x
        if deviation > 0 and at.timestep > 0:
            x = x + deviation * noise.normal(x.shape)
        yield x


def noise_terms(at: Point, to: Point, options: Options = Options()) -> tuple[float, float]:
    """An error of epsilon of one moves x_0 by -sigma / alpha."""
    _, forward, deviation = _posterior(at, to, options)
    return deviation, -to.alpha * forward / (at.sigma * max(at.alpha, 1e-12))


def _posterior(at: Point, to: Point, options: Options) -> tuple[float, float, float]:
    """Of the step between the points: alpha / alpha', the forward step's variance, and the deviation of the noise to add."""
    kept = at.alpha / to.alpha
    forward = 1.0 - kept**2
    return kept, forward, math.sqrt(forward) * (to.sigma / at.sigma if options.variance == "small" else 1.0)
