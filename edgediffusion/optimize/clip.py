"""How far the range of an activation is cut: the part of the observed range with the least error of the layer's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from edgediffusion.optimize.integers import affine
from edgediffusion.optimize.observe import by_channel, layers_of, tensors
from edgediffusion.optimize.observed import Observed
from edgediffusion.optimize.state import LayerState

CANDIDATES = tuple(np.round(np.geomspace(1.0, 0.2, 24), 4).tolist())
ITEMS = 32  # a tenth of the usual items tells the ratio as well as all do


def input_clips(
    module: torch.nn.Module,
    items: Sequence[Mapping[str, np.ndarray]],
    layers: Mapping[str, LayerState],
    found: Mapping[str, Observed],
    bits: Mapping[str, int],
    *,
    progress: Callable[[float], None] = lambda part: None,
) -> dict[str, float]:
    """The clip of each layer that ``bits`` has the activations' width of, searched over ``CANDIDATES`` on a spread part of the items.

    The error of channel c counts with f_c^2 sum_o,k w_ock^2: what it does to the layer's output (section 2.1 of Q-Diffusion,
    2302.04304, searches in the same way, with every channel alike).
    """
    if not bits:
        return {}
    errors = {name: np.zeros(len(CANDIDATES)) for name in bits}
    counts = {name: output_importance(found[name], layers[name]) for name in bits}

    def hook(name: str) -> Callable[..., None]:
        state, width = layers[name], bits[name]
        factors = torch.from_numpy(state.factors)[:, None]
        low, high = state.input_range()

        def record(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x = by_channel(layer, inputs[0]) / factors
            for i, part in enumerate(CANDIDATES):
                q = affine(low * part, high * part, width, signed=False)
                read = (torch.clamp(torch.round(x / q.scale) + q.zero, q.lowest, q.highest) - q.zero) * q.scale
                errors[name][i] += float((counts[name] * (x - read).square().mean(1)).sum())

        return record

    watch_part(module, {name: hook(name) for name in bits}, items, progress)
    return {name: CANDIDATES[int(error.argmin())] for name, error in errors.items()}


def watch_part(
    module: torch.nn.Module,
    hooks: Mapping[str, Callable[..., None]],
    items: Sequence[Mapping[str, np.ndarray]],
    progress: Callable[[float], None],
) -> None:
    """Run the network on a spread part of the items, ``ITEMS`` of them, with a forward hook at each of the named layers."""
    modules = layers_of(module)
    handles = [modules[name].register_forward_hook(hook) for name, hook in hooks.items()]
    chosen = [items[i] for i in np.unique(np.linspace(0, len(items) - 1, ITEMS).astype(int))]
    try:
        with torch.no_grad():
            for done, item in enumerate(chosen):
                module(**tensors(item))
                progress((done + 1) / len(chosen))
    finally:
        for handle in handles:
            handle.remove()


def output_importance(layer: Observed, state: LayerState) -> torch.Tensor:
    """What the error of each channel of x / f does to the layer's output: f_c^2 sum_o,k w_ock^2. [channels]"""
    if layer.groups > 1:
        return torch.ones(len(state.factors))
    squares = (layer.weight.reshape(*layer.weight.shape[:2], -1).astype(np.float64) ** 2).sum((0, 2))
    return torch.from_numpy((squares * state.factors.astype(np.float64) ** 2).astype(np.float32))
