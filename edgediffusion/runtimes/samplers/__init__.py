"""Samplers: one file each, a module with the two functions below and what it is made for.

    ORDER: float                                                how the error of a deterministic sampler falls with the
                                                                number of steps; 0 for one that adds noise
    KIND: "diffusion", "flow" or "both"                         the schedules that it takes
    points(schedule: NoiseSchedule, steps: int) -> Points       where it calls the network
    sample(denoise, x, points, noise) -> Iterator[np.ndarray]   the state after each call, the last one is the result

and, where it adds noise in every step,

    noise_terms(at: Point, to: Point) -> (s, c)                 a step adds noise of deviation s, and an error of the
                                                                network's epsilon enters the state times c

where its calls do not divide evenly into steps and it can begin in the middle all the same, as image to image does,

    after(points: Points, skipped: int) -> Points               the walk without that many of its first steps

``denoise(x, i)`` returns the network's estimate of x_0 at ``points.at[i]``: a sampler never asks what the network
predicts. ``x`` is float32 [batch, ...], the state as the network sees it (see schedules.py); ``noise`` is a stream of
standard normal numbers, used by samplers that add some. A sampler keeps its state in the call and leaves ``x`` as it is. A
state that it yields is the caller's until the next step is asked for: what is added to it in place counts.

A step may take several calls (Heun's method, the warm-up of PNDM). ``points`` then has an entry for each: ``denoise(x, i)``
is called exactly once for each i in order, and each call is followed by a state, the one that the next call reads. Two
entries may lie at one point. ``steps`` are the user's, ``len(points)`` the calls.

A module may say ``PARALLEL = True``: it asks about several steps at once, and has ``rounds`` beside ``sample`` (_parallel.py).
Then calls come out of order and may be repeated, while states are yielded as ever, so what counts calls or changes states in
between cannot go with it.

A sampler with options states them as a frozen dataclass ``Options`` (see options.py), which its functions take as their last
argument; ``resolve`` binds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Protocol, cast

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.errors import ArgumentError
from edgediffusion.runtimes.noise import Noise
from edgediffusion.runtimes.options import choose
from edgediffusion.runtimes.schedules import Points

Denoise = Callable[[np.ndarray, int], np.ndarray]


class Sampler(Protocol):
    """The shape of a sampler: its module, or its module with options bound. Two that are equal have the same points."""

    def __hash__(self) -> int: ...

    @property
    def ORDER(self) -> float: ...

    @property
    def KIND(self) -> str: ...

    def points(self, schedule: NoiseSchedule, steps: int) -> Points: ...

    def sample(self, denoise: Denoise, x: np.ndarray, points: Points, noise: Noise) -> Iterator[np.ndarray]: ...


def resolve(text: str) -> tuple[str, Sampler]:
    """A sampler by its name, with options if it has any: ``ddim``, ``ddim:eta=0.5``. Returned with the text that names it.

    Raises:
        UnknownName: no such sampler. ArgumentError: an option that it does not have, or a value that it refuses.
    """
    chosen = choose("runtimes.samplers", text, kind="sampler")
    made = chosen.module if chosen.options is None else _Configured(chosen.module, chosen.options)
    return chosen.text, cast(Sampler, made)


def refuse_company(sampler: Sampler, name: str, company: Mapping[str, bool]) -> None:
    """Refuse what is there of ``company`` beside a sampler that is parallel in time.

    Raises:
        ArgumentError: something is, and the sampler is one.
    """
    present = [what for what, is_there in company.items() if is_there]
    if present and getattr(sampler, "PARALLEL", False):
        raise ArgumentError(
            f"The sampler '{name}' asks about several steps at once, and cannot go with {' or '.join(present)}",
            do="Leave that out, or take another sampler.",
        )


@dataclass(frozen=True)
class _Configured:
    module: ModuleType
    options: Any

    def __getattr__(self, name: str) -> Any:
        """What the module has; its functions with the options as their last argument."""
        value = getattr(self.module, name)
        return partial(value, options=self.options) if callable(value) else value
