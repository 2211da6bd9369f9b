"""Strategic stochastic sampling of trajectory consistency distillation: Zheng et al. 2024 (2402.19159), algorithm 4.

The network's estimate takes the state down to s = floor((1 - gamma) t'), below the next timestep t', and noise brings it
up again. gamma, diffusers' ``eta``, goes from 0, DDIM's steps, to 1, consistency sampling from x_0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.options import check_range
from edgediffusion.runtimes.samplers import Denoise
from edgediffusion.runtimes.samplers.lcm import solver_timesteps
from edgediffusion.runtimes.schedules import Points, alpha_bars, require_kind, variance_preserving

ORDER = 0.0
KIND = "diffusion"


@dataclass(frozen=True)
class Options:
    """``gamma`` is the authors' 0.3 for a few steps; more steps want more of it."""

    gamma: float = 0.3

    def __post_init__(self) -> None:
        check_range("gamma", self.gamma, 0.0, 1.0)


DEFAULT = Options()


def points(schedule: NoiseSchedule, steps: int, options: Options = DEFAULT) -> Points:
    """The timesteps of LCM. ``to[i]`` is the point s, from which noise leads up to ``at[i + 1]``; the last is timestep 0."""
    require_kind(schedule, "tcd", is_flow=False)
    bars = alpha_bars(schedule)
    timesteps = [int(t) for t in solver_timesteps(schedule, steps, "tcd")]
    # In float32 like diffusers, where 0.7 of a timestep may lie on the other side of a whole number.
    arrivals = [int(np.float32(1 - options.gamma) * np.float32(t)) for t in (*timesteps[1:], 0)]
    return Points(tuple(variance_preserving(bars, t) for t in timesteps), tuple(variance_preserving(bars, s) for s in arrivals))


def sample(denoise: Denoise, x: np.ndarray, points: Points, noise: Noise, options: Options = DEFAULT) -> Iterator[np.ndarray]:
    for i, (at, s) in enumerate(points):
        x0 = denoise(x, i)
        x = s.alpha * x0 + s.sigma * ((x - at.alpha * x0) / at.sigma)
        if options.gamma > 0 and i + 1 < len(points):
            kept = points.at[i + 1].alpha / s.alpha
            x = kept * x + math.sqrt(1.0 - kept**2) * noise.normal(x.shape)
        yield x
