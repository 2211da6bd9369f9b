"""Restart: Xu et al. 2023 (2306.14878), algorithm 1, with Heun's method in the main walk and in the restarts.

At a noise level t_min the state is given the noise that brings it up to t_max, and comes down again, K times: the noise
contracts the errors that have piled up. Levels are sigma / alpha. A step takes two calls of the network, the last one.
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
from edgediffusion.runtimes.schedules import Point, Points, between_timesteps, interpolated, require_kind

ORDER = 0.0
KIND = "diffusion"
RHO = 7.0  # of Karras' spacing within a restart


@dataclass(frozen=True)
class Restart:
    """From ``t_max`` to ``t_min`` in ``levels`` noise levels, both ends included, ``times`` times."""

    levels: int
    times: int
    t_min: float
    t_max: float


def restarts(table: str) -> tuple[Restart, ...]:
    """Read a table of restarts.

    Raises:
        ArgumentError: no such table.
    """
    found = []
    for entry in table.split("+"):
        try:
            levels, times, t_min, t_max = entry.split("/")
            restart = Restart(int(levels), int(times), float(t_min), float(t_max))
        except ValueError:
            restart = Restart(0, 0, 0.0, 0.0)
        if restart.levels < 2 or restart.times < 1 or not 0 < restart.t_min < restart.t_max < math.inf:
            raise ArgumentError(
                "The restart cannot be used", got=repr(entry), allowed="N/K/t_min/t_max: at least 2 levels, at least 1 time, t_min < t_max"
            )
        found.append(restart)
    return tuple(found)


@dataclass(frozen=True)
class Options:
    """``table`` is N/K/t_min/t_max for each restart, with + between them, by default the authors' for Stable Diffusion.

    Theirs for 36 steps on ImageNet 64: ``4/1/19.35/40.79+4/1/1.09/1.92+4/5/0.59/1.09+4/5/0.30/0.59+6/6/0.06/0.30`` with
    ``noise=1.003``. ``noise`` is how much more noise is added than is lacking, S_noise of the paper.
    """

    table: str = "10/2/0.1/2"
    noise: float = 1.0

    def __post_init__(self) -> None:
        check_range("noise", self.noise, 0.5, 2.0)
        restarts(self.table)


DEFAULT = Options()


def points(schedule: NoiseSchedule, steps: int, options: Options = DEFAULT) -> Points:
    """The points of Heun's method at the levels of the spacing, with those of the restarts between them.

    A restart begins at the level nearest to its t_min; it is left out where that is none below its t_max.
    """
    require_kind(schedule, "restart", is_flow=False)
    walk = interpolated(schedule, steps)
    main = [at.ratio for at in walk.at]
    begun = {int(np.argmin(np.abs(np.array(main) - r.t_min))): r for r in restarts(options.table)}
    at: list[Point] = []
    for i, point in enumerate(walk.at):
        at.append(point)
        if i > 0:
            if (restart := begun.get(i)) and main[i] < restart.t_max:
                at.extend(_walk(schedule, restart, point, main[0]) * restart.times)
            at.append(point)  # once as the end of a step, once more as the beginning of the next
    return Points.chain(tuple(at), noise_scale=walk.noise_scale)


def sample(denoise: Denoise, x: np.ndarray, points: Points, noise: Noise, options: Options = DEFAULT) -> Iterator[np.ndarray]:
    """Heun's method in Karras' state x / alpha, with s = sigma / alpha: calls come in pairs, at both ends of a step."""
    at = points.at
    for i in range(0, len(at) - 1, 2):
        begin, end = at[i], at[i + 1]
        step = end.ratio - begin.ratio
        d = (x - begin.alpha * denoise(x, i)) / begin.sigma
        euler = end.alpha * (x / begin.alpha + step * d)
        yield euler
        d = (d + (euler - end.alpha * denoise(euler, i + 1)) / end.sigma) / 2
        x = x / begin.alpha + step * d
        back = at[i + 2]
        if back.ratio > end.ratio:
            lacking = math.sqrt(back.ratio**2 - end.ratio**2)
            x = x + options.noise * lacking * noise.normal(x.shape)
        x = back.alpha * x
        yield x
    last, to = at[-1], points.to[-1]
    x0 = denoise(x, len(at) - 1)
    yield to.alpha * x0 + to.sigma * ((x - last.alpha * x0) / last.sigma)


def _walk(schedule: NoiseSchedule, restart: Restart, end: Point, most: float) -> list[Point]:
    """The points of one restart, down to ``end``, each inner one twice."""
    if restart.t_max > most:
        raise ArgumentError(
            "A restart leads above the noise that sampling starts from", got=f"t_max {restart.t_max:g}", allowed=f"{most:g}"
        )
    ends = (restart.t_max ** (1 / RHO), end.ratio ** (1 / RHO))
    levels = np.linspace(*ends, restart.levels)[:-1] ** RHO
    first, *inner = between_timesteps(schedule, levels.tolist())
    return [first, *(point for point in inner for _ in range(2)), end]
