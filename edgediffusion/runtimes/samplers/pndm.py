"""Pseudo numerical methods: Liu et al. 2022 (2202.09778), with a warm-up of linear multistep or of Runge-Kutta steps.

1. linear multistep (PLMS): the noise is extrapolated from its last four estimates, equation 12; the second call repeats the
   first step with the mean of both its ends, so n steps make n + 1 calls;
2. Runge-Kutta first (PRK): the first three steps are of equation 13, four calls each; n steps make n + 9 calls.

Either way the state goes along DDIM's path for the noise that was found, equation 11.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.errors import ArgumentError
from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.samplers import Denoise
from edgediffusion.runtimes.schedules import (
    CLEAN,
    NEARLY_ZERO,
    Point,
    Points,
    alpha_bars,
    is_ramp,
    require_kind,
    spaced,
    variance_preserving,
)
from edgediffusion.runtimes.spacings import EVEN

ORDER = 2.0
KIND = "diffusion"
RUNGE_KUTTA_STEPS = 3
MULTISTEP = ((1.0,), (1.5, -0.5), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))  # the newest first


@dataclass(frozen=True)
class Options:
    """Case 1 with ``skip_prk_steps``, as in Stable Diffusion's configuration, case 2 without."""

    skip_prk_steps: bool = True


def points(schedule: NoiseSchedule, steps: int, options: Options = Options()) -> Points:
    """Whole training timesteps at a common distance, from which the method takes its weights."""
    require_kind(schedule, "pndm", is_flow=False)
    if is_ramp(schedule) or schedule.spacing not in EVEN:
        raise ArgumentError("The sampler 'pndm' needs timesteps at a common distance", got=schedule.spacing, allowed=", ".join(EVEN))
    if not options.skip_prk_steps and steps <= RUNGE_KUTTA_STEPS:
        raise ArgumentError(
            "Three steps of 'pndm' are Runge and Kutta's", got=f"{steps} steps", allowed="4 and more, or skip_prk_steps=true"
        )
    bars = alpha_bars(schedule, end=NEARLY_ZERO)
    distance = schedule.train_steps // steps
    timesteps = [int(t) for t in np.round(spaced(schedule, steps))]
    at, to = _plms(timesteps, distance) if options.skip_prk_steps else _prk(timesteps, distance)
    last = CLEAN if schedule.set_alpha_to_one else variance_preserving(bars, 0)
    return Points(
        tuple(variance_preserving(bars, t) for t in at),
        tuple(variance_preserving(bars, t) if t >= 0 else last for t in to),
    )


def _plms(timesteps: Sequence[int], distance: int) -> tuple[list[int], list[int]]:
    """Where the network is called, and where each call arrives: the second call is where the first arrived, as is its end."""
    at = [*timesteps[:2], *timesteps[1:]]
    to = [t - distance for t in at]
    return at, [*to[:1], at[1], *to[2:]] if len(timesteps) > 1 else to


def _prk(timesteps: Sequence[int], distance: int) -> tuple[list[int], list[int]]:
    """Calls at the start, twice in the middle, and at the end; the middle of an odd distance is rounded both ways."""
    at, to, half = [], [], distance // 2
    for start, end in pairwise(timesteps[: RUNGE_KUTTA_STEPS + 1]):
        at += [start, end + half, end + half, end]
        to += [start - half, end + half, end, end]
    rest = timesteps[RUNGE_KUTTA_STEPS:]
    return [*at, *rest], [*to, *(t - distance for t in rest)]


def after(points: Points, skipped: int, options: Options = Options()) -> Points:
    """The walk without its first steps: it begins with the same warm-up, at a later timestep.

    Raises:
        ArgumentError: case 2, whose calls in the middle of steps lie elsewhere then.
    """
    if not options.skip_prk_steps:
        raise ArgumentError("A walk that begins with Runge and Kutta's steps cannot begin later", do="Take skip_prk_steps=true.")
    at, to = (points.at[0], *points.at[2:])[skipped:], (points.to[0], *points.to[2:])[skipped:]
    return Points((*at[:2], *at[1:]), (*to[:1], at[1], *to[1:]), points.noise_scale) if len(at) > 1 else Points(at, to, points.noise_scale)


def sample(denoise: Denoise, x: np.ndarray, points: Points, noise: Noise, options: Options = Options()) -> Iterator[np.ndarray]:
    past: list[np.ndarray] = []  # estimates of the noise at the beginnings of steps, the newest first
    warm_up = _runge_kutta if not options.skip_prk_steps else _repeated_first
    done = 0
    for state in warm_up(denoise, x, points, past):
        x, done = state, done + 1
        yield x
    for i in range(done, len(points)):
        past.insert(0, _epsilon(denoise, x, points, i))
        del past[len(MULTISTEP) :]
        x = _moved(x, points.at[i], points.to[i], _weighted(MULTISTEP[len(past) - 1], past))
        yield x


def _repeated_first(denoise: Denoise, x: np.ndarray, points: Points, past: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The first step by Euler, then once more by the mean of its ends; only its beginning is remembered."""
    start, at = x, points.at[0]
    past.append(_epsilon(denoise, x, points, 0))
    x = _moved(start, at, points.to[0], past[0])
    yield x
    if len(points) > 1:
        yield _moved(start, at, points.to[1], 0.5 * (_epsilon(denoise, x, points, 1) + past[0]))


def _runge_kutta(denoise: Denoise, x: np.ndarray, points: Points, past: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Each call but the last goes on from where the step began, with the newest estimate alone."""
    for first in range(0, 4 * RUNGE_KUTTA_STEPS, 4):
        start, at, found = x, points.at[first], []
        for i in range(first, first + 4):
            found.append(_epsilon(denoise, x, points, i))
            epsilon = found[-1] if len(found) < 4 else _weighted((1 / 6, 1 / 3, 1 / 3, 1 / 6), found)
            x = _moved(start, at, points.to[i], epsilon)
            yield x
        past.insert(0, found[0])


def _epsilon(denoise: Denoise, x: np.ndarray, points: Points, i: int) -> np.ndarray:
    at = points.at[i]
    return (x - at.alpha * denoise(x, i)) / at.sigma


def _moved(x: np.ndarray, at: Point, to: Point, epsilon: np.ndarray) -> np.ndarray:
    """DDIM's step with a noise that need not be that of the point: x_0 is what the noise leaves of x."""
    return (to.alpha / at.alpha) * (x - at.sigma * epsilon) + to.sigma * epsilon


def _weighted(weights: Sequence[float], arrays: Sequence[np.ndarray]) -> np.ndarray:
    total = weights[0] * arrays[0]
    for weight, array in zip(weights[1:], arrays[1:], strict=True):
        total = total + weight * array
    return total
