"""The same number of items at evenly spaced steps: Q-Diffusion (Li et al., 2302.04304; ``get_train_samples`` of its code).

The steps are ``range(0, S, S // wanted)`` for S sampling steps. Where S is no multiple of ``wanted`` there are more of
them than were asked for: S = 250 and wanted = 20 give 21. Both halves of a guidance batch enter, as in the paper's sets
for Stable Diffusion, which it counts as two items and we as one.

Ours: without ``wanted``, the 25 of Stable Diffusion, or every step where there are fewer; and samples that do not divide
are spread evenly over the steps, where the paper names the number for each step instead of a total.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgediffusion.errors import ArgumentError
from edgediffusion.optimize.calibration import Features, check_range, spread

WANTED = 25


@dataclass(frozen=True)
class Strategy:
    """``wanted`` steps, or a few more, out of all."""

    SKIPS: ClassVar[bool] = True
    wanted: int | None = None

    def __post_init__(self) -> None:
        check_range("stride", "wanted", self.wanted, 1, 10_000)

    def allocate(self, steps: int, samples: int, *, seed: int, features: Callable[[str | None], Features]) -> np.ndarray:
        chosen = chosen_steps(steps, min(WANTED, steps) if self.wanted is None else self.wanted)
        if samples < len(chosen):
            raise ArgumentError(
                "stride keeps as many items at each step that it chooses, and there are fewer items than such steps",
                got=f"{samples} items for {len(chosen)} of {steps} steps",
                do=f"Give {len(chosen)} items or more, or choose fewer steps with --option wanted={samples}.",
            )
        counts = np.zeros(steps, np.int64)
        counts[list(chosen)] = spread(samples, len(chosen))
        return counts


def chosen_steps(steps: int, wanted: int) -> range:
    """Q-Diffusion's list of steps.

    Raises:
        ArgumentError: more steps are wanted than there are, for which its formula has a stride of zero.
    """
    if wanted > steps:
        raise ArgumentError("stride cannot choose more steps than there are", got=wanted, allowed=f"1 to {steps}")
    return range(0, steps, steps // wanted)
