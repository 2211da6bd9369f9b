"""From a training schedule and a number of steps to the points of a trajectory.

One convention serves variance-preserving, variance-exploding and flow-matching models: a point is (alpha, sigma,
timestep) with x = alpha x_0 + sigma noise, and x is what the network sees. A variance-exploding state (Karras et al.
2022) x_0 + s noise, which Euler's method is written in, is x / alpha here, with s = sigma / alpha.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.errors import ArgumentError, BundleError
from edgediffusion.registry import find, names
from edgediffusion.runtimes.options import Chosen, choose

NEARLY_ZERO = 2.0**-24  # diffusers' alpha_bar of pure noise, where a sampler must divide by alpha


@dataclass(frozen=True)
class Point:
    alpha: float
    sigma: float
    timestep: float

    @property
    def ratio(self) -> float:
        """s = sigma / alpha, the noise level of Karras et al. 2022 (2206.00364); for alpha > 0."""
        return self.sigma / self.alpha

    @property
    def half_log_snr(self) -> float:
        """lambda = log(alpha / sigma) of Lu et al. 2022 (2206.00927); for alpha > 0, infinite at the clean picture."""
        return math.log(self.alpha) - math.log(self.sigma) if self.sigma > 0 else math.inf


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


def respaced(schedule: NoiseSchedule, spacing: str | None) -> NoiseSchedule:
    """The schedule with another spacing, a name of ``runtimes.spacings`` with its options; None leaves it as it is.

    A ramp on a flow runs between the ends that the flow's own spacing has, unless it is told others.

    Raises:
        UnknownName: no such spacing. ArgumentError: an option that it does not have, or timesteps for a flow, which has none.
    """
    if spacing is None:
        return schedule
    chosen = _spacing(spacing)
    if schedule.kind == "flow" and not hasattr(chosen.module, "ramp"):
        ramps = [name for name in names("runtimes.spacings") if hasattr(find("runtimes.spacings", name), "ramp")]
        raise ArgumentError(f"A flow has no training timesteps for the spacing '{spacing}' to pick", allowed=", ".join(ramps))
    if schedule.kind == "flow" and spaced_as(schedule, "trailing") and "ends=" not in chosen.text and hasattr(chosen.options, "ends"):
        return replace(schedule, spacing=f"{chosen.text}{',' if ':' in chosen.text else ':'}ends=trailing")
    return replace(schedule, spacing=chosen.text)


def levels(schedule: NoiseSchedule, steps: int, *, with_end: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """float64 [steps] each, descending: sigma / alpha where the network is called, and the training timestep, mostly a fraction.

    Levels are interpolated linearly between training timesteps; timesteps of a ramp linearly in log level, as diffusers does.
    """
    check_steps(steps, schedule.train_steps)
    table, chosen = _ratios(schedule), _spacing(schedule.spacing)
    if not hasattr(chosen.module, "ramp"):
        timesteps = spaced(schedule, steps, with_end=with_end)
        return np.interp(timesteps, np.arange(len(table)), table), timesteps
    whole = with_end and chosen.options.ends == "linspace"  # multistep solvers run over the whole table even in one step
    ends = spaced(replace(schedule, spacing=chosen.options.ends), 2 if whole else steps)[[0, -1]]
    ramp = chosen.module.ramp(*np.interp(ends, np.arange(len(table)), table).tolist(), steps, chosen.options)
    return ramp, _timesteps_of(schedule, ramp)


def spaced(schedule: NoiseSchedule, steps: int, *, with_end: bool = False) -> np.ndarray:
    """float64 [steps], descending: training timesteps of a spacing that picks timesteps. ``with_end``: see ``spacings``."""
    check_steps(steps, schedule.train_steps)
    chosen = _spacing(schedule.spacing)
    options = () if chosen.options is None else (chosen.options,)
    return check_timesteps(chosen.module.timesteps(schedule, steps, *options, with_end=with_end), schedule.train_steps)


def _ratios(schedule: NoiseSchedule) -> np.ndarray:
    """float64 [train_steps]: sigma / alpha at each training timestep, rounded to float32 as in diffusers' tables."""
    bars = alpha_bars(schedule, end=NEARLY_ZERO).astype(np.float32)
    ratios: np.ndarray = np.sqrt((np.float32(1) - bars) / bars).astype(np.float64)
    return ratios


def _timesteps_of(schedule: NoiseSchedule, ratios: np.ndarray) -> np.ndarray:
    """Training timesteps of noise levels, fractions, linear in the logarithm of the level; its table is diffusers' in float32."""
    logarithms = np.log(_ratios(schedule).astype(np.float32)).astype(np.float64)
    timesteps: np.ndarray = np.interp(np.log(ratios), logarithms, np.arange(len(logarithms)))
    return timesteps


def is_ramp(schedule: NoiseSchedule) -> bool:
    """Whether the spacing gives noise levels rather than training timesteps."""
    return hasattr(_spacing(schedule.spacing).module, "ramp")


def ramped(schedule: NoiseSchedule, sigmas: np.ndarray) -> np.ndarray:
    """The sigmas of a flow, or a ramp from the first to the last of them where the schedule's spacing is one."""
    chosen = _spacing(schedule.spacing)
    if not hasattr(chosen.module, "ramp"):
        return sigmas
    moved: np.ndarray = chosen.module.ramp(float(sigmas[0]), float(sigmas[-1]), len(sigmas), chosen.options)
    return moved


def _spacing(text: str) -> Chosen:
    return choose("runtimes.spacings", text, kind="spacing")


def variance_preserving(bars: np.ndarray, timestep: int) -> Point:
    bar = float(bars[timestep])
    return Point(math.sqrt(bar), math.sqrt(1.0 - bar), float(timestep))


def variance_exploding(ratio: float, timestep: float) -> Point:
    """The point with sigma / alpha = ``ratio`` and alpha^2 + sigma^2 = 1."""
    alpha = 1.0 / math.sqrt(1.0 + ratio * ratio)
    return Point(alpha, ratio * alpha, timestep)


def interpolated(schedule: NoiseSchedule, steps: int) -> Points:
    """The points of Euler's method and its relatives: any noise level, and the fraction of a timestep that it lies at."""
    ratios, timesteps = levels(schedule, steps)
    at = tuple(variance_exploding(float(r), float(t)) for r, t in zip(ratios, timesteps, strict=True))
    # With leading spacing diffusers starts from sqrt(1 + s^2) noise, which is noise of unit variance here.
    return Points.chain(at, noise_scale=1.0 if spaced_as(schedule, "leading") else at[0].sigma)


def between_timesteps(schedule: NoiseSchedule, ratios: Sequence[float]) -> tuple[Point, ...]:
    """Points of any noise level, at the fraction of a training timestep that it lies at."""
    timesteps = _timesteps_of(schedule, np.array(ratios)).tolist()
    return tuple(variance_exploding(r, t) for r, t in zip(ratios, timesteps, strict=True))


def multistep(schedule: NoiseSchedule, steps: int) -> Points:
    """The points of DPM-Solver and its relatives, where the network is told whole timesteps.

    Of a ramp these are the nearest to its levels, or those below. A flow starts one training step below pure noise, where
    lambda is finite.
    """
    check_steps(steps, schedule.train_steps)
    if schedule.kind == "flow":
        sigmas = shifted(schedule, 1.0 - np.linspace(1.0, 1.0 / schedule.train_steps, steps + 1))[::-1][:-1]
        return Points.chain(tuple(Point(1.0 - s, s, float(int(s * schedule.train_steps))) for s in ramped(schedule, sigmas).tolist()))
    ratios, timesteps = levels(schedule, steps, with_end=True)
    if not is_ramp(schedule):
        bars = alpha_bars(schedule, end=NEARLY_ZERO)
        return Points.chain(tuple(variance_preserving(bars, int(t)) for t in check_timesteps(np.round(timesteps), schedule.train_steps)))
    # diffusers rounds Karras' timesteps, and cuts off the fraction of the others.
    whole = np.round(timesteps) if schedule.spacing.startswith("karras") else np.floor(timesteps)
    return Points.chain(tuple(variance_exploding(float(r), float(t)) for r, t in zip(ratios, whole, strict=True)))


def ending_at_first_timestep(points: Points, schedule: NoiseSchedule) -> Points:
    """The points with their end at the lowest noise level of the training, where the spacing is one of timesteps."""
    if schedule.kind == "flow" or is_ramp(schedule):
        return points
    return replace(points, to=(*points.to[:-1], variance_preserving(alpha_bars(schedule), 0)))


def spaced_as(schedule: NoiseSchedule, even: str) -> bool:
    """Whether an even spacing, such as ``leading``, is the schedule's, or that of the ends of its ramp."""
    return even in (schedule.spacing, getattr(_spacing(schedule.spacing).options, "ends", ""))


def at_size(schedule: NoiseSchedule, height: int, width: int) -> NoiseSchedule:
    """The schedule for pictures of so many pixels: its dynamic shift, if it has one, as a number.

    mu is linear in the number of tokens, and the shift e^mu: FLUX.1 (Black Forest Labs 2024), as diffusers' ``calculate_shift``.
    """
    dynamic = schedule.dynamic_shift
    if dynamic is None:
        return schedule
    tokens = (height // dynamic.token_pixels) * (width // dynamic.token_pixels)
    slope = (dynamic.most - dynamic.base) / (dynamic.most_tokens - dynamic.base_tokens)
    mu = dynamic.base + slope * (tokens - dynamic.base_tokens)
    return replace(schedule, shift=math.exp(mu) if dynamic.exponential else mu, dynamic_shift=None)


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
    suits = ("flow" if schedule.kind == "flow" else "diffusion", "both")
    fitting = [name for name in names("runtimes.samplers") if find("runtimes.samplers", name).KIND in suits]
    raise ArgumentError(f"The sampler '{sampler}' is not made for a schedule of kind '{schedule.kind}'", allowed=", ".join(fitting))


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


def exponential_integral(polynomial: np.ndarray, start: float, rate: float) -> float:
    """The integral of polynomial(u) e^{rate u} from ``start`` to 0; coefficients from the highest power, as np.poly has them.

    By parts: the integral of p e^{ru} is e^{ru} (p / r - p' / r^2 + p'' / r^3 - ...).
    """
    total, derivative, sign = 0.0, np.asarray(polynomial, float), 1.0 / rate
    while derivative.size:
        total += sign * (float(derivative[-1]) - math.exp(rate * start) * float(np.polyval(derivative, start)))
        derivative, sign = np.polyder(derivative), -sign / rate
        if not derivative.any():
            break
    return total
