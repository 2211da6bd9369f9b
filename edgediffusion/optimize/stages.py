"""Stages of sampling: runs of steps whose activations have ranges of their own (APQ-DM, CVPR 2024; TDQ, 2306.02316).

What a diffusion network's layers see changes with the noise level. Those papers learn or tabulate a scale for every step; engines
want constants. So there is a graph for each stage: their weights are the same file, their activation scales are not.

The last steps may be the float network's: what is wrong with their predictions goes straight into the picture, and no later step takes
it back.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from edgediffusion.errors import ArgumentError

Items = Sequence[tuple[int, Mapping[str, np.ndarray]]]


def split_items(items: Items, stages: int) -> list[Items]:
    """``items``, sampling steps and feeds, by stage: as many steps in each, the first steps in the first.

    Raises:
        ArgumentError: there are fewer steps than stages, or none of a stage's steps has an item.
    """
    steps = max(step for step, _ in items) + 1
    parts: list[Items] = [[item for item in items if item[0] * stages // steps == stage] for stage in range(stages)]
    if not all(parts):
        raise ArgumentError(
            f"There are no calibration items for one of the {stages} stages",
            got=f"items of {len({step for step, _ in items})} steps",
            do="Calibrate with more samples, a strategy that covers all steps, or fewer stages.",
        )
    return parts


def boundaries(items: Items, stages: int) -> tuple[float, ...]:
    """The time steps below which each stage but the first begins: midway between those of the items on either side."""
    times = [[float(np.max(feeds["timestep"])) for _, feeds in part] for part in split_items(items, stages)]
    return tuple((min(before) + max(after)) / 2 for before, after in itertools.pairwise(times))


def without_last(items: Items, steps: int, last: int) -> tuple[Items, tuple[float, ...]]:
    """The items of all but the ``last`` of so many steps, and the time step below which these begin, if there are any.

    Raises:
        ArgumentError: no item lies on either side of it.
    """
    if not last:
        return items, ()
    before, after = ([item for item in items if (item[0] >= steps - last) is late] for late in (False, True))
    if not before or not after:
        raise ArgumentError(
            f"The last {last} of {steps} steps are to be float, and there are no calibration items {'in' if before else 'before'} them",
            do="Calibrate with more samples, a strategy that covers all steps, or fewer float steps.",
        )
    latest = [float(np.max(feeds["timestep"])) for _, feeds in before]
    return before, ((min(latest) + max(float(np.max(feeds["timestep"])) for _, feeds in after)) / 2,)
