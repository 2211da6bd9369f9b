"""The balance of every layer that a recipe quantizes, by the method of ``balance/`` that it names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from edgediffusion import registry
from edgediffusion.optimize.balance import Balance, Network
from edgediffusion.optimize.observed import Observed
from edgediffusion.optimize.recipe import Recipe

if TYPE_CHECKING:
    import torch


def by_statistics(found: Mapping[str, Observed], recipe: Recipe, prefix: str = "") -> dict[str, Balance]:
    """Balances from what layers saw; layers that read one tensor share theirs. ``prefix`` of the paths is unknown to the recipe."""
    method: ModuleType = registry.find("optimize.balance", recipe.balance)
    balances: dict[str, Balance] = {}
    for name, layer in found.items():
        if name in balances:
            continue
        readers = [other for other in layer.readers or (name,) if recipe.excludes(other.removeprefix(prefix)) is None]
        alone = name not in readers or any(found[other].groups > 1 for other in readers)
        shared = [name] if alone else readers
        bits = recipe.bits(name.removeprefix(prefix))
        chosen = _ones(layer) if alone else method.factors([found[other] for other in shared], bits)
        balances.update(dict.fromkeys(shared, Balance(chosen)))
    return balances


def by_running(
    module: torch.nn.Module,
    feeds: Sequence[Mapping[str, np.ndarray]],
    found: Mapping[str, Observed],
    recipe: Recipe,
    prefix: str = "",
    *,
    progress: Callable[[float], None] = lambda part: None,
) -> dict[str, Balance]:
    """Balances from running the network with every one of ``feeds``; layers that the method leaves out have factors of 1."""
    method: ModuleType = registry.find("optimize.balance", recipe.balance)
    wanted = {n: layer for n, layer in found.items() if layer.groups == 1 and recipe.excludes(n.removeprefix(prefix)) is None}
    bits = {name: recipe.bits(name.removeprefix(prefix)) for name in wanted}
    groups = {name: recipe.group for name, layer in wanted.items() if recipe.groups(layer.weight.shape) > 1}
    balances: dict[str, Balance] = method.of_network(Network(module, feeds, wanted, bits, groups, recipe.rank, progress))
    return {name: balances.get(name) or Balance(_ones(layer)) for name, layer in found.items()}


def _ones(layer: Observed) -> np.ndarray:
    return np.ones(len(layer.input.low), np.float32)
