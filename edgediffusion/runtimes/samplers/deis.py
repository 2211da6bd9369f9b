"""DEIS in log rho, of order one to three: Zhang and Chen 2023 (2204.13902), as diffusers has it.

rho = sigma / alpha. The estimate of the noise is taken for the polynomial in log rho through its last values, and integrated
over rho; with one value that is DDIM.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.runtimes import schedules
from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.options import check_choice
from edgediffusion.runtimes.samplers import Denoise
from edgediffusion.runtimes.schedules import Points

ORDER = 2.0
KIND = "both"
FEW = 15  # steps, below which the last is of first and the last but one of second order


@dataclass(frozen=True)
class Options:
    order: int = 2

    def __post_init__(self) -> None:
        check_choice("order", self.order, (1, 2, 3))


def points(schedule: NoiseSchedule, steps: int, options: Options = Options()) -> Points:
    """Those of ``dpmpp-2m``, but the end is the noise level of the first training timestep.

    A ramp or a flow ends at the clean picture by a step of first order. (diffusers stays at the last level there.)
    """
    return schedules.ending_at_first_timestep(schedules.multistep(schedule, steps), schedule)


def sample(denoise: Denoise, x: np.ndarray, points: Points, noise: Noise, options: Options = Options()) -> Iterator[np.ndarray]:
    past: deque[tuple[float, np.ndarray]] = deque(maxlen=options.order)  # log rho and the noise there, the newest first
    for i, (at, to) in enumerate(points):
        x0 = denoise(x, i)
        epsilon = (x - at.alpha * x0) / at.sigma
        past.appendleft((math.log(at.ratio), epsilon))
        left = len(points) - i if len(points) < FEW or to.sigma == 0 else options.order
        known = list(past)[:left]
        x = to.alpha * x0 + to.sigma * epsilon
        if len(known) > 1:
            # The weights have the sum rho' - rho: a step is DDIM's, and what the earlier values add to it.
            weights = _weights([u for u, _ in known], math.log(to.ratio))
            for weight, (_, earlier) in zip(weights[1:], known[1:], strict=True):
                x = x + (to.alpha * weight) * (earlier - epsilon)
        yield x


def _weights(nodes: Sequence[float], end: float) -> list[float]:
    """Of each Lagrange polynomial of the nodes (in u = log rho), the integral over rho = e^u from the first node to ``end``."""
    found = []
    for k, node in enumerate(nodes):
        others = [other - end for j, other in enumerate(nodes) if j != k]
        polynomial = np.poly(others) / math.prod(node - end - other for other in others)
        found.append(math.exp(end) * schedules.exponential_integral(polynomial, nodes[0] - end, 1.0))
    return found
