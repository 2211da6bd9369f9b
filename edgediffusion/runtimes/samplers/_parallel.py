"""What the samplers that are parallel in time share: DDIM's steps as affine maps, and rounds of calls.

They guess the states of a window of steps, ask the network about all of them at once, and improve the guesses: more calls
than one after the other, but in fewer rounds. Experimental, and of use only where a batch of several states takes as long as
one. That takes graphs with a timestep for each row: then a loop asks ``rounds`` about many states in one call (windows.py).
With others ``sample`` asks one by one, and nothing is gained.

``PARALLEL`` in such a sampler's module says that calls come out of order, and that a call may be repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.errors import ArgumentError
from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.samplers import Denoise, ddim
from edgediffusion.runtimes.schedules import Point, Points

DenoiseMany = Callable[[Sequence[np.ndarray], Sequence[int]], Sequence[np.ndarray]]


@dataclass(frozen=True)
class Round:
    """One round: ``calls`` of the network that do not wait for each other, and the ``states`` that are final now, in order.

    A call is a question about one state here, however many of them the network is asked at a time.
    """

    calls: int
    states: tuple[np.ndarray, ...]


class Parallel(Protocol):
    """What a sampler that is parallel in time has beside ``sample``."""

    def rounds(self, denoise: DenoiseMany, x: np.ndarray, points: Points, noise: Noise) -> Iterator[Round]: ...


@dataclass(frozen=True)
class Affine:
    """DDIM's step of 2010.02502, equation 12, for a given estimate of the noise: x' = a x + b epsilon + ``noise``.

    ``spread`` is the deviation of the noise that eta = 1 adds, for which the equation has sigma.
    """

    at: Point
    a: float
    b: float
    spread: float
    noise: np.ndarray | float

    def __call__(self, x: np.ndarray, epsilon: np.ndarray) -> np.ndarray:
        moved: np.ndarray = self.a * x + self.b * epsilon + self.noise
        return moved

    def epsilon(self, x: np.ndarray, x0: np.ndarray) -> np.ndarray:
        estimate: np.ndarray = (x - self.at.alpha * x0) / self.at.sigma
        return estimate


def points(schedule: NoiseSchedule, steps: int, sampler: str) -> Points:
    """Those of DDIM, without pure noise: the estimate of the noise is what is kept of a guess, and there it is the state itself."""
    found = ddim.points(schedule, steps)
    if any(at.alpha == 0 for at in found.at):
        raise ArgumentError(f"The sampler '{sampler}' cannot start from pure noise", do="Take leading spacing, or the sampler ddim.")
    return found


def affine(points: Points, noise: Noise, shape: Sequence[int], eta: float) -> tuple[Affine, ...]:
    """The steps of ``points``. Their noise is drawn now, in order: it is that of the sampler ``ddim`` with the same eta."""
    steps = []
    for at, to in points:
        spread = to.sigma / at.sigma * math.sqrt(max(1.0 - (at.alpha / to.alpha) ** 2, 0.0))
        drawn = np.float32(eta * spread) * noise.normal(shape) if eta > 0 else 0.0
        a = to.alpha / at.alpha
        steps.append(Affine(at, a, math.sqrt(to.sigma**2 - (eta * spread) ** 2) - a * at.sigma, spread, drawn))
    return tuple(steps)


def one_by_one(denoise: Denoise) -> DenoiseMany:
    return lambda states, indices: [denoise(x, i) for x, i in zip(states, indices, strict=True)]


def in_parts(denoise: DenoiseMany, most: int) -> DenoiseMany:
    """A network that is asked about no more than so many states at a time, in parts as equal as can be; 0 for any number."""
    if most == 0:
        return denoise

    def ask(states: Sequence[np.ndarray], indices: Sequence[int]) -> list[np.ndarray]:
        parts = math.ceil(len(indices) / most)
        ends = [len(indices) * part // parts for part in range(parts + 1)]
        return [x0 for begin, end in pairwise(ends) for x0 in denoise(states[begin:end], indices[begin:end])]

    return ask


def in_order(rounds: Iterable[Round]) -> Iterator[np.ndarray]:
    """The states of rounds as a sampler yields them."""
    for finished in rounds:
        yield from finished.states
