"""Multistep consistency sampling of a latent consistency model: Luo et al. 2023 (2310.04378), algorithm 3."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.errors import ArgumentError
from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.samplers import Denoise
from edgediffusion.runtimes.schedules import Point, Points, alpha_bars, check_timesteps, levels, require_kind, variance_preserving
from edgediffusion.runtimes.spacings import EVEN

ORDER = 0.0
KIND = "diffusion"
SOLVER_STEPS = 50  # of the solver that the students were distilled from: they know its timesteps only
TIMESTEP_SCALING = 10.0
SIGMA_DATA = 0.5


def points(schedule: NoiseSchedule, steps: int) -> Points:
    require_kind(schedule, "lcm", is_flow=False)
    bars = alpha_bars(schedule)
    return Points.chain(tuple(variance_preserving(bars, int(t)) for t in solver_timesteps(schedule, steps, "lcm")))


def solver_timesteps(schedule: NoiseSchedule, steps: int, sampler: str) -> np.ndarray:
    """Evenly picked from the timesteps of the distillation's solver, from the noisiest down; or those of a spacing that is
    no even one, rounded: a list of timesteps, say."""
    if schedule.spacing not in EVEN:
        return check_timesteps(np.round(levels(schedule, steps)[1]), schedule.train_steps)
    solver = min(SOLVER_STEPS, schedule.train_steps)
    if not 1 <= steps <= solver:
        raise ArgumentError(f"The number of steps of the sampler '{sampler}' cannot be used", got=steps, allowed=f"1 to {solver}")
    known = np.arange(solver, 0, -1) * (schedule.train_steps // solver) - 1
    picked: np.ndarray = known[np.floor(np.linspace(0, solver, steps, endpoint=False)).astype(int)]
    return picked


def boundary(timestep: float) -> tuple[float, float]:
    """c_skip and c_out: at timestep 0 the consistency function is the identity. Appendix A of the paper."""
    t = timestep * TIMESTEP_SCALING
    return SIGMA_DATA**2 / (t**2 + SIGMA_DATA**2), t / math.sqrt(t**2 + SIGMA_DATA**2)


def sample(denoise: Denoise, x: np.ndarray, points: Points, noise: Noise) -> Iterator[np.ndarray]:
    for i, (at, to) in enumerate(points):
        c_skip, c_out = boundary(at.timestep)
        x = c_skip * x + c_out * denoise(x, i)
        if i < len(points) - 1:
            x = to.alpha * x + to.sigma * noise.normal(x.shape)
        yield x


def noise_terms(at: Point, to: Point) -> tuple[float, float]:
    """s = sigma'; the boundary condition lets c_out of the estimate of x_0 through, which an error of epsilon moves."""
    return to.sigma, -to.alpha * boundary(at.timestep)[1] * at.sigma / at.alpha
