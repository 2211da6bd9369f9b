"""ParaTAA: Tang et al. 2024 (2402.09970), algorithm 1: a triangular system solved with Anderson's acceleration.

The states of a window of steps solve a triangular system: each is a function of those before it. It is solved by fixed-point
iteration over ``order`` steps at a time (equation 8), extrapolated from ``memory`` rounds. In the extrapolation of a state, the
states before it alone take part, so that what is converged is not disturbed. Experimental: see _parallel.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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

Residuals = Mapping[int, tuple[np.ndarray, np.ndarray]]  # by number of the state: what it was, and how far it had to move


@dataclass(frozen=True)
class Options:
    """A state is final when it is off by no more than ``absolute``, or ``relative`` times the noise that DDPM adds there.

    ``window`` steps are asked at once, or ``batch`` at a time if it is not 0. ``ridge`` keeps the extrapolation small, ``eta`` is
    DDIM's. With both tolerances 0 the picture is DDIM's but for rounding. ``memory`` 1 is the plain iteration.
    """

    window: int = 10
    order: int = 3
    memory: int = 2
    ridge: float = 1e-3
    absolute: float = 0.01
    relative: float = 0.05
    eta: float = 0.0
    batch: int = 0

    def __post_init__(self) -> None:
        check_range("window", self.window, 1, 1000)
        check_range("order", self.order, 1, 1000)
        check_range("memory", self.memory, 1, 10)
        check_range("ridge", self.ridge, 1e-12, 1e3)
        check_range("absolute", self.absolute, 0.0, 10.0)
        check_range("relative", self.relative, 0.0, 10.0)
        check_range("eta", self.eta, 0.0, 1.0)
        check_range("batch", self.batch, 0, 1000)


DEFAULT = Options()


def points(schedule: NoiseSchedule, steps: int, options: Options = DEFAULT) -> Points:
    return _parallel.points(schedule, steps, "parataa")


def sample(denoise: Denoise, x: np.ndarray, points: Points, noise: Noise, options: Options = DEFAULT) -> Iterator[np.ndarray]:
    return in_order(rounds(one_by_one(denoise), x, points, noise, options))


def rounds(denoise: DenoiseMany, x: np.ndarray, points: Points, noise: Noise, options: Options = DEFAULT) -> Iterator[Round]:
    steps = affine(points, noise, x.shape, options.eta)
    denoise = in_parts(denoise, options.batch)
    states = [x] * (len(steps) + 1)
    history: list[Residuals] = []
    begin, reached = 0, 0
    while begin < len(steps):
        end = min(begin + options.window, len(steps))
        states[reached + 1 : end + 1] = [states[reached]] * (end - reached)  # new in the window: as the last one that was
        reached, window = end, range(begin, end)
        x0 = denoise([states[i] for i in window], window)
        epsilon = [steps[i].epsilon(states[i], estimate) for i, estimate in zip(window, x0, strict=True)]
        final = _first_off(steps, states, window, epsilon, options)
        residuals = _residuals(steps, states, window, epsilon, options.order)
        history = [*history, residuals][-options.memory :]
        for i, change in _changes(history, window, final, options.ridge).items():
            states[i] = states[i] + change
        yield Round(len(window), tuple(states[begin + 1 : final + 1]))
        begin = final


def _first_off(
    steps: Sequence[Affine], states: Sequence[np.ndarray], window: range, epsilon: Sequence[np.ndarray], options: Options
) -> int:
    """The first state that is not where one step from the one before it leads; after this round it is final as well."""
    for i in window:
        off = steps[i](states[i], epsilon[i - window.start]) - states[i + 1]
        size = float(np.sqrt((off.astype(np.float64) ** 2).mean(axis=tuple(range(1, off.ndim)))).max())
        if size > max(options.absolute, options.relative * steps[i].spread):
            return i + 1
    return window.stop


def _residuals(
    steps: Sequence[Affine], states: Sequence[np.ndarray], window: range, epsilon: Sequence[np.ndarray], order: int
) -> Residuals:
    """How far each state is from where ``order`` steps lead with the noise as it was estimated."""
    found = {}
    for i in window:
        first = max(window.start, i + 1 - order)
        moved = states[first]
        for j in range(first, i + 1):
            moved = steps[j](moved, epsilon[j - window.start])
        found[i + 1] = (states[i + 1], moved - states[i + 1])
    return found


def _changes(history: Sequence[Residuals], window: range, final: int, ridge: float) -> dict[int, np.ndarray]:
    """The residuals less what the rounds before foretell of them: Anderson's update, from the states so far alone.

    With the changes dX, dR from round to round of the states before and of this one, gamma solves (dR dR' + ridge) gamma = dR R,
    image by image, and the state moves by R - gamma (dX + dR). States up to the final one are moved by R itself.
    """
    latest = history[-1]
    images = len(latest[window.start + 1][1])
    rounds = len(history) - 1
    gram, product = np.zeros((images, rounds, rounds)), np.zeros((images, rounds))
    changes = {}
    for i in range(window.start + 1, window.stop + 1):
        residual = latest[i][1]
        known = [p for p in range(rounds) if i in history[p] and i in history[p + 1]]
        change = {p: tuple(after - before for before, after in zip(history[p][i], history[p + 1][i], strict=True)) for p in known}
        flat = {p: change[p][1].reshape(images, -1).astype(np.float64) for p in known}
        for p in known:
            product[:, p] += np.einsum("nd,nd->n", flat[p], residual.reshape(images, -1))
            for q in known:
                gram[:, p, q] += np.einsum("nd,nd->n", flat[p], flat[q])
        changes[i] = residual
        if i > final and known:
            chosen = np.ix_(range(images), known, known)
            gamma = np.linalg.solve(gram[chosen] + ridge * np.eye(len(known)), product[:, known][..., None])[..., 0]
            for number, p in enumerate(known):
                weight = gamma[:, number].astype(np.float32).reshape(-1, *(1,) * (residual.ndim - 1))
                changes[i] = changes[i] - weight * (change[p][0] + change[p][1])
    return changes
