"""Noise levels that the caller lists, as diffusers' ``sigmas`` argument: ``sigmas:at=1/0.75/0.5/0.25``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgediffusion.errors import ArgumentError
from edgediffusion.runtimes.options import check_choice
from edgediffusion.runtimes.spacings import EVEN
from edgediffusion.runtimes.spacings._listed import check_count, falling


@dataclass(frozen=True)
class Options:
    """``at`` are levels, sigma / alpha or sigma of a flow, descending, with / between them; the end at 0 is left out."""

    at: str = ""
    ends: str = "linspace"

    def __post_init__(self) -> None:
        falling(self.at, "sigmas")
        check_choice("ends", self.ends, EVEN)


DEFAULT = Options()


def ramp(largest: float, smallest: float, steps: int, options: Options = DEFAULT) -> np.ndarray:
    listed = falling(options.at, "sigmas")
    check_count(listed, steps, "sigmas")
    if listed[-1] == 0:
        raise ArgumentError("Sampling ends at sigma 0 by itself", got=options.at, do="Leave the 0 out.")
    return listed
