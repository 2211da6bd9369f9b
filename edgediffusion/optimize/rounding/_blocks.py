"""Fit a network block after block: BRECQ (Li et al. 2021, 2102.05426) as Q-Diffusion (2302.04304) and EDA-DM (2401.04585) have it.

A unit is a residual block, a transformer block, or a layer that is in neither, in the order in which the network calls them. Its loss
is the squared error of what it gives to what it gives in the float network. Its inputs come from the network whose earlier units are
quantized, as learned so far; each value, with a probability of one half, from the float network instead (QDrop, 2203.05740; so
EDA-DM). EDA-DM's further losses of a block's inner layers are not taken.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree

from edgediffusion.optimize.observe import tensors
from edgediffusion.optimize.rounding import Job
from edgediffusion.optimize.rounding._fit import Method, descend, merged
from edgediffusion.optimize.simulate import NearestLayer, SimulatedLayer, simulated
from edgediffusion.optimize.state import LayerState

BLOCK = re.compile(r"^(.*?(?:resnets|transformer_blocks)\.\d+)\.")  # by the names that diffusers gives to lists of blocks
BATCH = 16  # items in one call of the network
ITEMS = 128  # that are learned on: the network runs with them twice for every unit
BUDGET = 2**30  # bytes of one unit's inputs and outputs; more items than fit are left out, evenly
FLOAT_PART = 0.5


def fit_blocks(job: Job, method: Method, wanted: Mapping[str, tuple[int, int]]) -> dict[str, LayerState]:
    units = units_of(job, wanted)
    chosen = _that_fit(job, list(units))
    learned: dict[str, LayerState] = {}
    for at, (path, names) in enumerate(units.items()):
        exact = _record(job, path, chosen, outputs=True)
        with simulated(job.module, learned, {name: wanted[name] for name in learned}, lambda bits: LearnedLayer):
            given = _record(job, path, chosen, outputs=False) if learned else exact
        bits = {name: wanted[name] for name in names}
        learned |= _fit_unit(job, method, path, bits, exact, given, at / len(units), 1 / len(units))
    return learned


def units_of(job: Job, wanted: Mapping[str, tuple[int, int]]) -> dict[str, list[str]]:
    """Paths of units, and of the layers in each, in the order in which the network calls them."""
    members: dict[str, list[str]] = {}
    for name in wanted:
        within = BLOCK.match(name)
        members.setdefault(within[1] if within else name, []).append(name)
    called: dict[str, list[str]] = {}

    def note(path: str) -> None:
        called[path] = members[path]

    handles = [job.module.get_submodule(p).register_forward_pre_hook(lambda _m, _x, path=p: note(path)) for p in members]
    with torch.no_grad():
        job.module(**tensors(job.items[0]))
    for handle in handles:
        handle.remove()
    return called


class LearnedLayer(NearestLayer):
    """A layer with the codes and the bias of its state."""

    def __init__(self, layer: torch.nn.Module, state: LayerState, bits: tuple[int, int]):
        super().__init__(layer, state, bits)
        assert state.codes is not None
        assert state.bias is not None
        self.given = torch.from_numpy(state.codes).float()
        self.bias = torch.nn.Parameter(torch.from_numpy(state.bias))

    def read_weight(self) -> torch.Tensor:
        return self.given * self.weight_step


@dataclass(frozen=True)
class _Calls:
    """What a unit was called with and gave: tensors with a row for each row of the items, and the rest as in the first call."""

    inputs: list[Any]  # leaves of its arguments
    spec: Any
    output: list[torch.Tensor]
    rows: int

    def some(self, rows: torch.Tensor) -> list[Any]:
        return [leaf[rows] if self.varies(leaf) else leaf for leaf in self.inputs]

    def varies(self, leaf: object) -> bool:
        return isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and len(leaf) == self.rows


class _Reached(Exception):
    pass


def _record(job: Job, path: str, chosen: Sequence[int], *, outputs: bool) -> _Calls:
    """Call the network with the chosen items, up to the unit."""
    inputs: list[list[Any]] = []
    given: list[list[torch.Tensor]] = []
    specs: list[Any] = []

    def before(_unit: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves, spec = _pytree.tree_flatten((args, kwargs))
        inputs.append([leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves])
        specs.append(spec)
        if not outputs:
            raise _Reached

    def after(_unit: torch.nn.Module, _args: object, output: Any) -> None:
        given.append([leaf.detach() for leaf in _pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)])
        raise _Reached

    unit, rows = job.module.get_submodule(path), _rows_of(job)
    handles = [unit.register_forward_pre_hook(before, with_kwargs=True), unit.register_forward_hook(after)]
    try:
        for at in range(0, len(chosen), BATCH):
            with torch.no_grad(), suppress(_Reached):
                job.module(**merged(job, chosen[at : at + BATCH], rows))
    finally:
        for handle in handles:
            handle.remove()
    first = rows * min(BATCH, len(chosen))
    return _Calls(
        [_joined(parts, first) for parts in zip(*inputs, strict=True)],
        specs[0],
        [torch.cat(p) for p in zip(*given, strict=True)],
        rows * len(chosen),
    )


def _joined(parts: Sequence[Any], rows: int) -> Any:
    first = parts[0]
    varies = isinstance(first, torch.Tensor) and first.ndim > 0 and len(first) == rows
    return torch.cat(list(parts)) if varies else first


def _rows_of(job: Job) -> int:
    return max(len(array) for array in job.items[0].values())


def _that_fit(job: Job, paths: Sequence[str]) -> list[int]:
    """Items that are learned on: ``ITEMS``, or as many as the largest unit has room for."""

    def size(path: str) -> int:
        calls = _record(job, path, [0], outputs=True)
        leaves = [leaf for leaf in calls.inputs if isinstance(leaf, torch.Tensor)]
        return 4 * (2 * sum(leaf.numel() for leaf in leaves) + sum(leaf.numel() for leaf in calls.output))

    count = min(max(1, BUDGET // max(map(size, paths))), ITEMS, len(job.items))
    return [int(i) for i in np.unique(np.linspace(0, len(job.items) - 1, count).astype(int))]


def _fit_unit(
    job: Job, method: Method, path: str, bits: Mapping[str, tuple[int, int]], exact: _Calls, given: _Calls, done: float, part: float
) -> dict[str, LayerState]:
    generator, rows = torch.Generator().manual_seed(job.seed), _rows_of(job)

    def error(chosen: np.ndarray) -> torch.Tensor:
        taken = torch.from_numpy((chosen[:, None] * rows + np.arange(rows)).ravel())
        pairs = zip(given.some(taken), exact.some(taken), strict=True)
        args, kwargs = _pytree.tree_unflatten([_mixed(q, x, generator) for q, x in pairs], given.spec)
        output = [leaf for leaf in _pytree.tree_leaves(job.module.get_submodule(path)(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]
        return torch.stack([(y - wanted[taken]).square().mean() for y, wanted in zip(output, exact.output, strict=True)]).sum()

    items = given.rows // rows
    with torch.no_grad(), simulated(job.module, job.layers, bits):
        nearest = max(float(np.mean([error(np.array([i])).item() for i in range(0, items, 8)])), 1e-12)
    with simulated(job.module, job.layers, bits, method.kind) as layers:
        fitted: list[SimulatedLayer] = list(layers.values())
        descend(method, fitted, lambda some: error(some) / nearest, items, job.seed, lambda p: job.progress(done + part * p))
        return {name: layer.learned(job.layers[name]) for name, layer in layers.items()}


def _mixed(quantized: Any, exact: Any, generator: torch.Generator) -> Any:
    if not isinstance(quantized, torch.Tensor) or not quantized.is_floating_point() or quantized is exact:
        return quantized
    return torch.where(torch.rand(quantized.shape, generator=generator) < FLOAT_PART, exact, quantized)
