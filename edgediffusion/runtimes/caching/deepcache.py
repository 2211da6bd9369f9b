"""DeepCache for UNets: Ma et al. 2023 (2312.00858). The deep levels run at some calls only, the shallow ones at every call.

At a full call the tensor that enters the cut layer of the up path is kept; at the others it stands in for everything below.
Where full calls lie is a function of their number and the interval N alone, k = ceil(T / N) of T calls:

1. uniform, equation 6: every N-th.
2. non-uniform, equation 7: L = linspace((-c)^(1/p), (T - c)^(1/p), k), I = unique(int(L^p + c)), densest around the center
   c. The authors' code takes k + 1 points and drops the last, adds c after rounding, and lowers p by 0.02 until there
   are k different ones. The root of -c is complex there, and rounding drops the imaginary part: flavour ``reference``. The
   flavour ``signed`` takes sgn(v) |v|^(1/p), what the equation seems to mean.
3. center-less, as the authors have it for latent diffusion on ImageNet: linspace(0, T^(1/p), k + 1)^p, rounded, without the
   last; there may be fewer than k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edgediffusion.bundle import Bundle, Component
from edgediffusion.errors import ArgumentError
from edgediffusion.runtimes.caching._cuts import Skip, skip
from edgediffusion.runtimes.network import Call, Joined, Network
from edgediffusion.runtimes.options import check_choice, check_range

SCHEDULES = ("uniform", "non-uniform", "center-less")
FLAVOURS = ("reference", "signed")
_LESS = 0.02


@dataclass(frozen=True)
class Policy:
    """``cut`` is the outermost one of the bundle by default. ``center`` is the number of a call, from 0."""

    interval: int = 5
    cut: str = ""
    schedule: str = "uniform"
    center: int = 15
    power: float = 1.4
    flavour: str = "reference"

    def __post_init__(self) -> None:
        check_range("interval", self.interval, 1, 1000)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("flavour", self.flavour, FLAVOURS)
        check_range("center", self.center, 0, 1000)
        check_range("power", self.power, 1.0, 10.0)

    def components(self, bundle: Bundle) -> tuple[Component, ...]:
        return skip(bundle, self.cut)

    def start(self, graphs: Joined, calls: int) -> Network:
        unet, full, kept = Skip(graphs), frozenset(self.full_calls(calls)), False

        def ask(call: Call) -> np.ndarray:
            nonlocal kept
            if call.number in full or not kept:
                kept = True
                return unet.whole(call)
            return unet.shallow(call)

        return ask

    def full_calls(self, calls: int) -> tuple[int, ...]:
        """The numbers of the full calls, ascending from 0.

        Raises:
            ArgumentError: equation 7 has no solution for this center and power.
        """
        if self.schedule == "uniform":
            return tuple(range(0, calls, self.interval))
        count = math.ceil(calls / self.interval)
        if self.schedule == "center-less":
            return _centerless(calls, count, self.power)
        return self._centered(calls, count)

    def _centered(self, calls: int, count: int) -> tuple[int, ...]:
        if not self.center < calls:
            raise ArgumentError("The center of deepcache's schedule is beyond the last call", got=self.center, allowed=f"0 to {calls - 1}")
        spaced, p = _complex if self.flavour == "reference" else _signed, self.power
        while p > 1:
            numbers = [0, *(int(v) + self.center for v in np.unique(spaced(calls, count, self.center, p).astype(np.int32))[1:-1])]
            if len(numbers) == count:
                return tuple(numbers)
            p -= _LESS
        raise ArgumentError(
            f"deepcache finds no {count} full calls of {calls} around the center {self.center}",
            got=f"power {self.power:g}",
            do="Take another center, a larger power, or schedule=uniform.",
        )


def _complex(calls: int, count: int, center: int, p: float) -> np.ndarray:
    ends = (-center) ** (1 / p), (calls - center) ** (1 / p)
    spaced: np.ndarray = np.linspace(*ends, count + 1) ** p
    return spaced.real


def _signed(calls: int, count: int, center: int, p: float) -> np.ndarray:
    values = np.linspace(-(center ** (1 / p)), (calls - center) ** (1 / p), count + 1)
    signed: np.ndarray = np.sign(values) * np.abs(values) ** p
    return signed


def _centerless(calls: int, count: int, p: float) -> tuple[int, ...]:
    spaced = np.linspace(0, calls ** (1 / p), count + 1) ** p
    return tuple(int(v) for v in np.unique(spaced.astype(np.int32))[:-1])
