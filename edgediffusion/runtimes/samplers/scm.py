"""Multistep consistency sampling along TrigFlow: Lu and Song 2024 (2410.11081), as diffusers' ``SCMScheduler`` does it.

TrigFlow is x_t = cos(t) x_0 + sin(t) z for t from pi / 2 down to 0, with data and state divided by sigma_d, and its network
F is v of Salimans and Ho 2022: x_0 = cos(t) x - sin(t) F. So a diffusion is a TrigFlow at tan(t) = sigma / alpha, and a flow is
one at sigma = sin(t) / (cos(t) + sin(t)), its state being smaller by cos(t) + sin(t): that is the wrapper of SANA-Sprint
(2503.09641), which needs nothing of a network that predicts a flow. The network is told its own timestep at that noise level;
one that was trained on t itself cannot be told it by a bundle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.errors import ArgumentError
from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.options import check_range
from edgediffusion.runtimes.samplers import Denoise
from edgediffusion.runtimes.schedules import NEARLY_ZERO, Point, Points, alpha_bars, between_timesteps, check_steps, flow

ORDER = 0.0
KIND = "both"
ROUNDED = 1.5708  # diffusers' largest angle, pi / 2 rounded up


@dataclass(frozen=True)
class Options:
    """Angles: ``largest`` is where sampling starts, ``middle`` the second of two steps. sCM's largest is arctan(160) = 1.5645."""

    largest: float = math.pi / 2
    middle: float = 1.3

    def __post_init__(self) -> None:
        check_range("largest", self.largest, 0.1, ROUNDED)
        check_range("middle", self.middle, 0.0, ROUNDED)
        if self.middle >= self.largest:
            raise ArgumentError("The option 'middle' is not below 'largest'", got=f"{self.middle:g} and {self.largest:g}")


DEFAULT = Options()


def points(schedule: NoiseSchedule, steps: int, options: Options = DEFAULT) -> Points:
    """Angles evenly down to 0, which is not called; for two steps ``largest`` and ``middle``.

    A diffusion starts no higher than it was trained: its last training timestep of Stable Diffusion is t = 1.5025.
    """
    check_steps(steps, schedule.train_steps)
    angles = np.array([options.largest, options.middle]) if steps == 2 else np.linspace(options.largest, 0, steps + 1)[:-1]
    angles = np.minimum(angles, math.pi / 2)
    if schedule.kind == "flow":
        return flow(schedule, np.sin(angles) / (np.cos(angles) + np.sin(angles)))
    last = float(alpha_bars(schedule, end=NEARLY_ZERO)[-1])
    ratios = np.minimum(np.tan(angles), math.sqrt((1.0 - last) / last))
    return Points.chain(between_timesteps(schedule, ratios.tolist()))


def sample(denoise: Denoise, x: np.ndarray, points: Points, noise: Noise, options: Options = DEFAULT) -> Iterator[np.ndarray]:
    for i, (_, to) in enumerate(points):
        x = denoise(x, i)
        if i + 1 < len(points):
            x = to.alpha * x + to.sigma * noise.normal(x.shape)
        yield x


def noise_terms(at: Point, to: Point, options: Options = DEFAULT) -> tuple[float, float]:
    """s = sigma'; x_0 moves by -sigma / alpha for an error of epsilon of one, so c = -alpha' sigma / alpha."""
    return to.sigma, -to.alpha * at.sigma / at.alpha
