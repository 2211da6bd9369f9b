"""Windows of the samplers that are parallel in time (samplers/_parallel.py), asked of the network in one call.

Every row is then at a time step of its own. Rows are the pictures of the first state, then those of the next one; with
classifier-free guidance all unconditional rows come first, as ever. So a window is to the network what more pictures would be.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from edgediffusion.runtimes.control import Lead
from edgediffusion.runtimes.denoiser import Denoiser

if TYPE_CHECKING:
    from edgediffusion.runtimes.request import Plan

    # a plan, its conditions [rows, ...] and further channels [images, ...] -> the denoiser of its pictures
    Make = Callable[[Plan, Mapping[str, np.ndarray], np.ndarray | None], Denoiser]

_KEPT = 4  # denoisers: their conditions are copies. A window that guidance or a ControlNet parts has a few sizes


@dataclass(frozen=True)
class Window:
    """``window(states, indices)``: the estimates of x_0 for states [images, ...] at several points, by one call of the network.

    ``denoiser(n)`` is one of n states of every picture. Steps for which ``alike`` gives different answers cannot share a call.
    """

    denoiser: Callable[[int], Denoiser]
    alike: Callable[[int], Hashable]

    def __call__(self, states: Sequence[np.ndarray], indices: Sequence[int]) -> list[np.ndarray]:
        return self.denoiser(len(states)).together(states, indices)

    def groups(self, indices: Sequence[int]) -> list[slice]:
        """The fewest parts of a window of which each can be asked in one call."""
        found, begin = [], 0
        for _, group in groupby(indices, self.alike):
            end = begin + sum(1 for _ in group)
            found.append(slice(begin, end))
            begin = end
        return found


def window(plan: Plan, conditions: Mapping[str, np.ndarray], beside: np.ndarray | None, leads: Sequence[Lead], make: Make) -> Window:
    """The window of a plan's pictures. Guidance may be on for a part of the steps, and ControlNets may lead for a part of them."""
    halves = 2 if plan.classifier_free else 1

    @lru_cache(maxsize=_KEPT)
    def denoiser(states: int) -> Denoiser:
        images, *rest = plan.latent_shape
        more = replace(plan, prompts=plan.prompts * states, latent_shape=(images * states, *rest))
        rows = {name: _repeated(given, halves, states) for name, given in conditions.items()}
        return make(more, rows, None if beside is None else _repeated(beside, 1, states))

    def alike(i: int) -> Hashable:
        return plan.guidance.is_on(plan.points.at[i]), *(lead.at(i, len(plan.points)) for lead in leads)

    return Window(denoiser, alike)


def told(plan: Plan, reason: str) -> tuple[str, ...]:
    """A warning that a sampler which would ask about a window at once does not; none where there is no ``reason``."""
    if not reason:
        return ()
    return (f"The sampler '{plan.sampler_name}' asked about one state after the other, which gains nothing: {reason}.",)


def is_parallel(plan: Plan) -> bool:
    """Whether the plan's sampler asks about several steps at once."""
    return bool(getattr(plan.sampler, "PARALLEL", False))


def _repeated(rows: np.ndarray, halves: int, states: int) -> np.ndarray:
    """[halves x images, ...] -> [halves x states x images, ...]: each half so many times."""
    return np.concatenate([half for half in np.split(rows, halves) for _ in range(states)])
