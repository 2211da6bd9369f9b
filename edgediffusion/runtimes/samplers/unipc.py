"""UniPC, predicting x_0: Zhao et al. 2023 (2302.04867), algorithms 5 to 8 with varying coefficients.

A corrector uses the call at the end of a step to go over that step again, so it costs none. In the paper's letters: h is the
step in lambda = log(alpha / sigma), B(h) is h or e^h - 1 (here of -h), r_k where earlier estimates lie, in steps.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.runtimes import schedules
from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.options import check_choice
from edgediffusion.runtimes.samplers import Denoise
from edgediffusion.runtimes.schedules import Point, Points, check_steps, ramped, shifted

ORDER = 3.0
KIND = "both"


@dataclass(frozen=True)
class Options:
    """``order`` of the predictor, the corrector's is one more; ``kind`` is the paper's B_1(h) = h or B_2(h) = e^h - 1."""

    order: int = 2
    kind: str = "bh2"

    def __post_init__(self) -> None:
        check_choice("order", self.order, (1, 2, 3))
        check_choice("kind", self.kind, ("bh1", "bh2"))


def points(schedule: NoiseSchedule, steps: int, options: Options = Options()) -> Points:
    """Those of ``dpmpp-2m``; for a flow those of diffusers' UniPC, which starts a millionth below pure noise."""
    if schedule.kind != "flow":
        return schedules.multistep(schedule, steps)
    check_steps(steps, schedule.train_steps)
    sigmas = shifted(schedule, np.linspace(1.0, 1.0 / schedule.train_steps, steps + 1)[:-1])
    sigmas = ramped(schedule, np.minimum(sigmas, 1.0 - 1e-6))
    return Points.chain(tuple(Point(1.0 - s, s, float(int(s * schedule.train_steps))) for s in sigmas.tolist()))


def sample(denoise: Denoise, x: np.ndarray, points: Points, noise: Noise, options: Options = Options()) -> Iterator[np.ndarray]:
    past: deque[tuple[Point, np.ndarray]] = deque(maxlen=options.order)  # points and the estimates there, the newest first
    before, order = x, 0
    for i, (at, to) in enumerate(points):
        m = denoise(x, i)
        if i > 0:
            x = _moved(before, at, list(past)[:order], options.kind, m)
        past.appendleft((at, m))
        before, order = x, min(options.order, i + 1, len(points) - i)
        x = _moved(x, to, list(past)[:order], options.kind)
        yield x


def _moved(x: np.ndarray, to: Point, past: list[tuple[Point, np.ndarray]], kind: str, m_end: np.ndarray | None = None) -> np.ndarray:
    """From the newest point of ``past`` to ``to``: predicted, or with the estimate at the end corrected."""
    at, m = past[0]
    h = to.half_log_snr - at.half_log_snr
    first = math.expm1(-h)
    x = (to.sigma / at.sigma) * x - (to.alpha * first) * m
    r = [(point.half_log_snr - at.half_log_snr) / h for point, _ in past[1:]]
    differences = [(earlier - m) / rk for rk, (_, earlier) in zip(r, past[1:], strict=True)]
    if m_end is not None:
        r, differences = [*r, 1.0], [*differences, m_end - m]
    if differences:
        b = -h if kind == "bh1" else first
        for weight, difference in zip(_weights(r, h, b), differences, strict=True):
            x = x - (to.alpha * b * weight) * difference
    return x


def _weights(r: list[float], h: float, b: float) -> list[float]:
    """rho of R rho = b, equation 5 and theorem 3.1; one unknown alone is 1/2, whatever B(h): section 3.3."""
    if len(r) == 1:
        return [0.5]
    right, phi, factorial = [], math.expm1(-h) / -h - 1.0, 1.0
    for k in range(1, len(r) + 1):
        right.append(phi * factorial / b)
        factorial *= k + 1
        phi = phi / -h - 1.0 / factorial
    solved: list[float] = np.linalg.solve(np.vander(r, increasing=True).T, right).tolist()
    return solved
