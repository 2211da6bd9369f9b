"""DDIM with eta = 0: Song et al. 2021 (2010.02502), equation 12."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.samplers import Denoise
from edgediffusion.runtimes.schedules import CLEAN, Points, alpha_bars, interpolated, is_ramp, require_kind, spaced, variance_preserving
from edgediffusion.runtimes.spacings import EVEN

ORDER = 1.0
KIND = "diffusion"


def points(schedule: NoiseSchedule, steps: int) -> Points:
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


def sample(denoise: Denoise, x: np.ndarray, points: Points, noise: Noise) -> Iterator[np.ndarray]:
    for i, (at, to) in enumerate(points):
        x0 = denoise(x, i)
        epsilon = (x - at.alpha * x0) / at.sigma
        x = to.alpha * x0 + to.sigma * epsilon
        yield x
