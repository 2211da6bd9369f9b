"""What samplers share that call the network twice a step, and once in the last, which ends at the clean picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.samplers import Denoise
from edgediffusion.runtimes.schedules import Point, Points, between_timesteps


def ends(nodes: Sequence[Point], *, noise_scale: float = 1.0) -> Points:
    """The second call of a step lies where it arrives: p_0, p_1, p_1, p_2, p_2, ..., as in diffusers' Heun schedulers."""
    return Points.chain((nodes[0], *(p for node in nodes[1:] for p in (node, node))), noise_scale=noise_scale)


def middles(schedule: NoiseSchedule, nodes: Points, ratios: Sequence[float]) -> Points:
    """The second call of a step lies between its ends, at noise levels ``ratios``: p_0, m_0, p_1, m_1, p_2, ...

    As in diffusers' KDPM2 schedulers, which round the timesteps of Karras' spacing, though not those between.
    """
    at = nodes.at
    if schedule.spacing.startswith("karras"):
        at = tuple(replace(point, timestep=float(round(point.timestep))) for point in at)
    pairs = zip(between_timesteps(schedule, ratios), at[1:], strict=True)
    return Points.chain((at[0], *(p for pair in pairs for p in pair)), noise_scale=nodes.noise_scale)


def midpoint(
    denoise: Denoise, x: np.ndarray, points: Points, noise: Noise, fall: Callable[[Point, Point], tuple[float, float]]
) -> Iterator[np.ndarray]:
    """The midpoint method down to s_down, then up by noise of deviation s_up; ``fall`` gives both of a step, s = sigma / alpha.

    d is the derivative by s, the estimate of the noise; x_0 + s' d goes to s', see ``heun``.
    """
    for i in range(0, len(points), 2):
        at, middle = points.at[i], points.to[i]
        x0 = denoise(x, i)
        d = (x - at.alpha * x0) / at.sigma
        x = middle.alpha * x0 + middle.sigma * d
        yield x
        if i + 1 == len(points):
            return
        to = points.to[i + 1]
        s_down, s_up = fall(at, to)
        change = (x - middle.alpha * denoise(x, i + 1)) / middle.sigma - d
        x = to.alpha * (x0 + s_down * d + (s_down - at.ratio) * change)
        if s_up > 0:
            x += to.alpha * s_up * noise.normal(x.shape)
        yield x
