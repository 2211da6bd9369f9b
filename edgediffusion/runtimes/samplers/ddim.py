"""DDIM: Song et al. 2021 (2010.02502), equation 12."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.options import check_range
from edgediffusion.runtimes.samplers import Denoise
from edgediffusion.runtimes.schedules import (
    CLEAN,
    Point,
    Points,
    alpha_bars,
    interpolated,
    is_ramp,
    require_kind,
    spaced,
    variance_preserving,
)
from edgediffusion.runtimes.spacings import EVEN

ORDER = 1.0
KIND = "diffusion"


@dataclass(frozen=True)
class Options:
    """``eta`` of equation 16: no noise at 0, as much as DDPM adds at 1."""

    eta: float = 0.0

    def __post_init__(self) -> None:
        check_range("eta", self.eta, 0.0, 1.0)


def points(schedule: NoiseSchedule, steps: int, options: Options = Options()) -> Points:
    """Whole training timesteps. Step i arrives ``train_steps // steps`` below them, as diffusers' scheduler has it.

    That is the next timestep for leading spacing, and for trailing spacing when the division leaves no rest; with
    linspace it is another point, and the next call reads the state as if it lay on its own timestep all the same. With any
    other spacing, which diffusers' scheduler does not have, a step arrives at the next point.
    """
    require_kind(schedule, "ddim", is_flow=False)
    if is_ramp(schedule):
        return interpolated(schedule, steps)
    bars = alpha_bars(schedule)
    last = CLEAN if schedule.set_alpha_to_one else variance_preserving(bars, 0)
    timesteps = [int(t) for t in np.round(spaced(schedule, steps))]
    even = schedule.spacing in EVEN
    arrivals = [t - schedule.train_steps // steps for t in timesteps] if even else [*timesteps[1:], -1]
    at = tuple(variance_preserving(bars, t) for t in timesteps)
    return Points(at, tuple(variance_preserving(bars, t) if t >= 0 else last for t in arrivals))


def sample(denoise: Denoise, x: np.ndarray, points: Points, noise: Noise, options: Options = Options()) -> Iterator[np.ndarray]:
    for i, (at, to) in enumerate(points):
        x0 = denoise(x, i)
        epsilon = (x - at.alpha * x0) / at.sigma
        deviation = _deviation(at, to, options.eta)
        x = to.alpha * x0 + math.sqrt(to.sigma**2 - deviation**2) * epsilon
        if options.eta > 0:
            x = x + deviation * noise.normal(x.shape)
        yield x


def noise_terms(at: Point, to: Point, options: Options = Options()) -> tuple[float, float]:
    """An error of epsilon of one moves x_0 by -sigma / alpha and the direction to x by what noise leaves of sigma'."""
    deviation = _deviation(at, to, options.eta)
    return deviation, math.sqrt(to.sigma**2 - deviation**2) - to.alpha * at.sigma / max(at.alpha, 1e-12)


def _deviation(at: Point, to: Point, eta: float) -> float:
    """Equation 16: with eta = 1 that of DDPM. Only from noise down: diffusers' last step may stay where it is."""
    forward = 1.0 - (at.alpha / to.alpha) ** 2
    return eta * (to.sigma / at.sigma) * math.sqrt(max(forward, 0.0))
