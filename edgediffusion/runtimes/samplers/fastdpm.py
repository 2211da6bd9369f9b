"""FastDPM: Kong and Ping 2021 (2106.00132), for networks of continuous or whole timesteps.

``approximation=step`` picks training timesteps; ``approximation=var`` picks the variances of a shorter diffusion that ends in
as much noise, and tells the network the fraction of a timestep at which the long one has as much. The reverse process is
DDIM's with kappa for eta: 0 adds no noise (DDIM), 1 as much as the diffusion's own (DDPM).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.errors import ArgumentError
from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.options import check_choice, check_range
from edgediffusion.runtimes.samplers import Denoise, ddim
from edgediffusion.runtimes.schedules import Point, Points, alpha_bars, check_steps, require_kind, spaced, variance_preserving

ORDER = 0.0
KIND = "diffusion"
FINEST = 1e-12  # of the variance that is searched for; the authors stop at 1e-4 of the signal that is left


@dataclass(frozen=True)
class Options:
    approximation: str = "step"
    table: str = "quadratic"
    kappa: float = 0.0

    def __post_init__(self) -> None:
        check_choice("approximation", self.approximation, ("step", "var"))
        check_choice("table", self.table, ("linear", "quadratic"))
        check_range("kappa", self.kappa, 0.0, 1.0)


DEFAULT = Options()


def points(schedule: NoiseSchedule, steps: int, options: Options = DEFAULT) -> Points:
    require_kind(schedule, "fastdpm", is_flow=False)
    check_steps(steps, schedule.train_steps)
    bars = alpha_bars(schedule)
    if options.approximation == "step":
        picked = spaced(replace(schedule, spacing=f"fastdpm-{options.table}"), steps)
        return Points.chain(tuple(variance_preserving(bars, int(t)) for t in picked))
    short = np.cumprod(1.0 - variances(bars, steps, options.table))[::-1]
    # Between whole timesteps the signal's power falls as if each variance were spread over its timestep. The authors take the
    # product's own continuation by the logarithm of the gamma function, for linear variances: 0.03 timesteps off at most.
    timesteps = np.interp(-np.log(short), -np.log(bars), np.arange(len(bars)))
    at = (Point(math.sqrt(p), math.sqrt(1.0 - p), t) for p, t in zip(short.tolist(), timesteps.tolist(), strict=True))
    return Points.chain(tuple(at))


def variances(bars: np.ndarray, steps: int, table: str) -> np.ndarray:
    """float64 [steps], growing: variances of ``steps`` steps after which as much signal is left as after all of ``bars``.

    linear: from the first training variance evenly up. quadratic: beta_0 (1 + i x)^2. Appendix B of the paper.
    """
    first, left = 1.0 - float(bars[0]), float(bars[-1])
    if steps == 1:
        return np.array([1.0 - left])
    if (1.0 - first) ** steps < left:
        raise ArgumentError("FastDPM has no variances for so many steps of this schedule", got=steps, do="Take fewer steps.")

    def made(x: float) -> np.ndarray:
        return np.linspace(first, x, steps) if table == "linear" else first * (1.0 + np.arange(steps) * x) ** 2

    def signal(x: float) -> float:
        return float(np.prod(1.0 - made(x)))

    largest = 1.0 if table == "linear" else (first**-0.5 - 1.0) / (steps - 1)  # where the last variance is one
    return made(_bisect(signal, first if table == "linear" else 0.0, largest, left))


def sample(denoise: Denoise, x: np.ndarray, points: Points, noise: Noise, options: Options = DEFAULT) -> Iterator[np.ndarray]:
    return ddim.sample(denoise, x, points, noise, ddim.Options(options.kappa))


def noise_terms(at: Point, to: Point, options: Options = DEFAULT) -> tuple[float, float]:
    return ddim.noise_terms(at, to, ddim.Options(options.kappa))


def _bisect(falling: Callable[[float], float], low: float, high: float, target: float) -> float:
    """x with falling(x) = target."""
    while high - low > FINEST * high:
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > target else (low, middle)
    return (low + high) / 2
