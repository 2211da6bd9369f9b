"""From a training schedule and a number of steps to the points of a trajectory.

One convention serves variance-preserving, variance-exploding and flow-matching models: a point is (alpha, sigma,
timestep) with x = alpha x_0 + sigma noise, and x is what the network sees. A variance-exploding state (Karras et al.
2022) x_0 + s noise, which Euler's method is written in, is x / alpha here, with s = sigma / alpha.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.errors import ArgumentError, BundleError

SPACINGS = ("leading", "trailing", "linspace")
NEARLY_ZERO = 2.0**-24  # diffusers' alpha_bar of pure noise, where a sampler must divide by alpha


@dataclass(frozen=True)
class Point:
    alpha: float
    sigma: float
    timestep: float


CLEAN = Point(1.0, 0.0, 0.0)


@dataclass(frozen=True)
class Points:
    """A trajectory: the network is called at ``at[i]``, and step i arrives at ``to[i]``.

    ``to[i]`` is ``at[i + 1]``, except where diffusers' DDIM arrives beside the next point (see samplers/ddim.py).
    The start is ``noise_scale`` times standard normal noise.
    """

    at: tuple[Point, ...]
    to: tuple[Point, ...]
    noise_scale: float = 1.0

    def __len__(self) -> int:
        return len(self.at)

    def __iter__(self) -> Iterator[tuple[Point, Point]]:
        return iter(zip(self.at, self.to, strict=True))

    def start(self, noise: np.ndarray) -> np.ndarray:
        return noise * self.noise_scale

    @classmethod
    def chain(cls, at: tuple[Point, ...], *, noise_scale: float = 1.0) -> Points:
        """A trajectory through ``at`` that ends at the clean picture."""
        return cls(at, (*at[1:], CLEAN), noise_scale)


def alpha_bars(schedule: NoiseSchedule, *, end: float = 0.0) -> np.ndarray:
    """float64 [train_steps]: the signal power alpha^2 at each training timestep, as diffusers stores it.

    diffusers keeps the table in float32 and networks are trained with it, so it is rounded where theirs is: at small
    timesteps 1 - alpha_bar would differ by 1e-4 otherwise. ``end`` replaces the zero of a zero-terminal-SNR schedule.
    """
    alphas = np.float32(1) - _betas(schedule)
    bars = np.cumprod(alphas.astype(np.float64)).astype(np.float32).astype(np.float64)
    if schedule.zero_terminal_snr:
        bars[-1] = end
    return bars


def spaced(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    """float64 [steps], descending: training timesteps as DDIM and Euler take them; only linspace gives fractions.

    Source: Lin et al. 2023 (2305.08891), table 2, with diffusers' rounding.
    """
    check_steps(steps, schedule.train_steps)
    total = schedule.train_steps
    timesteps: np.ndarray
    if schedule.spacing == "linspace":
        timesteps = np.linspace(0, total - 1, steps)[::-1]
    elif schedule.spacing == "leading":
        timesteps = np.arange(steps)[::-1] * float(total // steps) + schedule.steps_offset
    elif schedule.spacing == "trailing":
        timesteps = np.round(total - np.arange(steps) * (total / steps)) - 1
    else:
        raise BundleError("The bundle's schedule has an unknown spacing", got=schedule.spacing, allowed=", ".join(SPACINGS))
    return check_timesteps(timesteps, total)


def variance_preserving(bars: np.ndarray, timestep: int) -> Point:
    bar = float(bars[timestep])
    return Point(math.sqrt(bar), math.sqrt(1.0 - bar), float(timestep))


def variance_exploding(ratio: float, timestep: float) -> Point:
    """The point with sigma / alpha = ``ratio`` and alpha^2 + sigma^2 = 1."""
    alpha = 1.0 / math.sqrt(1.0 + ratio * ratio)
    return Point(alpha, ratio * alpha, timestep)


def interpolated(schedule: NoiseSchedule, steps: int) -> Points:
    """The points of Euler's method: sigma / alpha interpolated linearly between training timesteps, as diffusers does."""
    timesteps = spaced(schedule, steps)
    bars = alpha_bars(schedule, end=NEARLY_ZERO)
    ratios = np.interp(timesteps, np.arange(len(bars)), np.sqrt((1.0 - bars) / bars))
    at = tuple(variance_exploding(float(r), float(t)) for r, t in zip(ratios, timesteps, strict=True))
    # With leading spacing diffusers starts from sqrt(1 + s^2) noise, which is noise of unit variance here.
    return Points.chain(at, noise_scale=1.0 if schedule.spacing == "leading" else at[0].sigma)


def shifted(schedule: NoiseSchedule, sigma: np.ndarray) -> np.ndarray:
    """Time moved towards noise for larger pictures: Esser et al. 2024 (2403.03206), equation 23."""
    moved: np.ndarray = schedule.shift * sigma / (1.0 + (schedule.shift - 1.0) * sigma)
    return moved


def flow(schedule: NoiseSchedule, sigmas: np.ndarray) -> Points:
    """Points of x = (1 - sigma) x_0 + sigma noise; the timestep is sigma in units of training steps."""
    return Points.chain(tuple(Point(1.0 - float(s), float(s), float(s) * schedule.train_steps) for s in sigmas))


def check_steps(steps: int, most: int) -> None:
    if not 1 <= steps <= most:
        raise ArgumentError("The number of steps cannot be used", got=steps, allowed=f"1 to {most}")


def check_timesteps(timesteps: np.ndarray, total: int) -> np.ndarray:
    if timesteps[0] > total - 1 or np.any(np.diff(timesteps) >= 0):
        raise ArgumentError(f"{len(timesteps)} steps do not fit into the {total} that the network was trained with", do="Take fewer steps.")
    return timesteps


def require_kind(schedule: NoiseSchedule, sampler: str, *, is_flow: bool) -> None:
    """Refuse a sampler that is not made for the bundle's kind of schedule."""
    if (schedule.kind == "flow") == is_flow:
        return
    fitting = "flow-euler, dpmpp-2m" if schedule.kind == "flow" else "ddim, euler, euler-ancestral, dpmpp-2m, lcm"
    raise ArgumentError(f"The sampler '{sampler}' is not made for a schedule of kind '{schedule.kind}'", allowed=fitting)


def _betas(schedule: NoiseSchedule) -> np.ndarray:
    """float32 [train_steps]: Ho et al. 2020 (linear), Rombach et al. 2022 (scaled), Nichol and Dhariwal 2021 (cosine)."""
    start, end, total = schedule.beta_start, schedule.beta_end, schedule.train_steps
    if schedule.kind == "linear":
        betas = _linspace(start, end, total)
    elif schedule.kind == "scaled_linear":
        betas = _linspace(start**0.5, end**0.5, total) ** 2
    elif schedule.kind == "squaredcos_cap_v2":
        bar = [math.cos((i / total + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(total + 1)]
        betas = np.array([min(1 - b / a, 0.999) for a, b in pairwise(bar)], np.float32)
    else:
        raise BundleError(
            "The bundle's schedule is of an unknown kind",
            got=schedule.kind,
            allowed="linear, scaled_linear, squaredcos_cap_v2, flow",
        )
    return _zero_terminal_snr(betas) if schedule.zero_terminal_snr else betas


def _linspace(start: float, end: float, size: int) -> np.ndarray:
    """torch.linspace in float32: a rounded step, taken from both ends by fused multiply-adds."""
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(size - 1))
    index = np.arange(size)
    return np.where(index < size // 2, first + step * index, last - step * (size - 1 - index)).astype(np.float32)


def _zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Lin et al. 2023 (2305.08891), algorithm 1; in float32 like diffusers, whose roundings the last alphas show."""
    root = np.sqrt(np.cumprod(np.float32(1) - betas, dtype=np.float64).astype(np.float32))
    first, last = root[0], root[-1]
    bars = ((root - last) * (first / (first - last))) ** 2
    return np.float32(1) - np.concatenate([bars[:1], bars[1:] / bars[:-1]])
