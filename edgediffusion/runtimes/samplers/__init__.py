"""Samplers: one file each, a module with the two functions below and its order of convergence.

    ORDER: float                                                how the error of a deterministic sampler falls with the
                                                                number of steps; 0 for one that adds noise
    points(schedule: NoiseSchedule, steps: int) -> Points       where it calls the network
    sample(denoise, x, points, noise) -> Iterator[np.ndarray]   the state after each step, the last one is the result

and, where it adds noise,

    noise_terms(at: Point, to: Point) -> (s, c)                 a step adds noise of deviation s, and an error of the
                                                                network's epsilon enters the state times c

``denoise(x, i)`` returns the network's estimate of x_0 at ``points.at[i]``: a sampler never asks what the network
predicts. ``x`` is float32 [batch, ...], the state as the network sees it (see schedules.py); ``noise`` is a stream of
standard normal numbers, used by samplers that add some. A sampler keeps its state in the call and leaves ``x`` as it is. A
state that it yields is the caller's until the next step is asked for: what is added to it in place counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.schedules import Points

Denoise = Callable[[np.ndarray, int], np.ndarray]


class Sampler(Protocol):
    """The shape of a sampler's module."""

    ORDER: float

    def points(self, schedule: NoiseSchedule, steps: int) -> Points: ...

    def sample(self, denoise: Denoise, x: np.ndarray, points: Points, noise: Noise) -> Iterator[np.ndarray]: ...
