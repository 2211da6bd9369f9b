"""Rounding of weights: one file per method, each with

    round_weights(job) -> dict[str, LayerState]      the layers it changes, with codes, and with other ranges if it learns them

``job`` is a ``Job``: the network, what it is fed, and the layers with their quantizers so far.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from edgediffusion.optimize.recipe import Recipe
from edgediffusion.optimize.state import LayerState

Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Job:
    """``progress`` takes the part that is done, 0..1."""

    module: torch.nn.Module
    items: Sequence[Feeds]
    layers: Mapping[str, LayerState]
    recipe: Recipe
    seed: int
    progress: Callable[[float], None]
    prefix: str = ""  # of the module paths, which the recipe does not know
    guidance_scale: float | None = None  # where items have two rows, the unconditional one first

    def bits(self, name: str) -> tuple[int, int]:
        return self.recipe.bits(name.removeprefix(self.prefix))

    def is_quantized(self, name: str) -> bool:
        return self.recipe.excludes(name.removeprefix(self.prefix)) is None and not self.layers[name].is_constant
