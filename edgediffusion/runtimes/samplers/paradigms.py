"""ParaDiGMS, Picard iteration over a sliding window: Shih et al. 2023 (2305.16317), algorithm 1. Experimental: see _parallel.py.

The states of a window of steps are guessed; the network's drifts at the guesses, summed up, give better ones. The window moves
on past the states that moved by less than ``tolerance`` times the noise that DDPM adds there, and past one at least.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.options import check_range
from edgediffusion.runtimes.samplers import Denoise, _parallel
from edgediffusion.runtimes.samplers._parallel import Affine, DenoiseMany, Round, affine, in_order, in_parts, one_by_one
from edgediffusion.runtimes.schedules import Points

ORDER = 1.0
KIND = "diffusion"
PARALLEL = True


@dataclass(frozen=True)
class Options:
    """``window`` steps are asked at once, or ``batch`` at a time if it is not 0; ``eta`` is DDIM's. With ``tolerance`` 0 the picture is
    DDIM's but for rounding."""

    window: int = 10
    tolerance: float = 0.1
    eta: float = 0.0
    batch: int = 0

    def __post_init__(self) -> None:
        check_range("window", self.window, 1, 1000)
        check_range("tolerance", self.tolerance, 0.0, 10.0)
        check_range("eta", self.eta, 0.0, 1.0)
        check_range("batch", self.batch, 0, 1000)


DEFAULT = Options()


def points(schedule: NoiseSchedule, steps: int, options: Options = DEFAULT) -> Points:
    return _parallel.points(schedule, steps, "paradigms")


def sample(denoise: Denoise, x: np.ndarray, points: Points, noise: Noise, options: Options = DEFAULT) -> Iterator[np.ndarray]:
    return in_order(rounds(one_by_one(denoise), x, points, noise, options))


def rounds(denoise: DenoiseMany, x: np.ndarray, points: Points, noise: Noise, options: Options = DEFAULT) -> Iterator[Round]:
    steps = affine(points, noise, x.shape, options.eta)
    denoise = in_parts(denoise, options.batch)
    states = [x] * (len(steps) + 1)  # the first guess: nothing moves
    begin, end = 0, min(options.window, len(steps))
    while begin < len(steps):
        window = range(begin, end)
        found = _summed(steps, states, window, denoise([states[i] for i in window], window))
        moved = [i for i in window if _moved(found[i - begin], states[i + 1], _variance(steps, i + 1)) > options.tolerance**2]
        states[begin + 1 : end + 1] = found
        final = (moved[0] if moved else end - 1) + 1
        states[end + 1 :] = [states[end]] * (len(steps) - end)  # the end of the window is the best guess of what follows
        yield Round(len(window), tuple(states[begin + 1 : final + 1]))
        begin, end = final, min(final + options.window, len(steps))


def _summed(steps: Sequence[Affine], states: Sequence[np.ndarray], window: range, x0: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The states after each step of the window: the one before it plus the drifts so far, summed in float64."""
    total = states[window.start].astype(np.float64)
    found = []
    for i, estimate in zip(window, x0, strict=True):
        step = steps[i]
        total = total + (step(states[i], step.epsilon(states[i], estimate)).astype(np.float64) - states[i])
        found.append(total.astype(np.float32))
    return found


def _variance(steps: Sequence[Affine], i: int) -> float:
    """What the step from state i would add; the last state, from which no step goes, has none and must not move at all."""
    return steps[i].spread ** 2 if i < len(steps) else 0.0


def _moved(found: np.ndarray, before: np.ndarray, variance: float) -> float:
    """The largest mean square of an image's change, in units of ``variance``."""
    squares = float(((found - before) ** 2).mean(axis=tuple(range(1, found.ndim))).max())
    return squares / variance if variance > 0 else (np.inf if squares > 0 else 0.0)
