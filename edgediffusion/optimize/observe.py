"""The observer in torch: statistics of every convolution's and linear layer's input and output, by channel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from edgediffusion.optimize.observed import Channels, Observed, not_finite

LAYERS = (torch.nn.Conv2d, torch.nn.Linear)


def layers_of(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: m for name, m in module.named_modules() if isinstance(m, LAYERS)}


def by_channel(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A layer's input or output as [channels, values]: axis 1 of a convolution's, the last one of a linear layer's."""
    axis = 1 if isinstance(layer, torch.nn.Conv2d) else x.ndim - 1
    return x.detach().movedim(axis, 0).flatten(1).float()


def observe(
    module: torch.nn.Module,
    items: Sequence[tuple[int, Mapping[str, np.ndarray]]],
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Observed]:
    """Call ``module`` with every item, a sampling step and its inputs by name, and watch its layers.

    Raises:
        ArgumentError: a layer gave a value that is no finite number; the message names the layer and the step.
    """
    layers = layers_of(module)
    found: dict[str, Observed] = {}
    read: dict[str, torch.Tensor] = {}  # held during one call, so that no two of them have the same identity
    step = 0

    def hook(name: str) -> Callable[..., None]:
        def record(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x, y = by_channel(layer, inputs[0]), by_channel(layer, output)
            if not torch.isfinite(y).all():
                raise not_finite(name, step)
            seen = found.setdefault(name, _new(layer, len(x), len(y)))
            _add(seen.input, x)
            _add(seen.output, y)
            seen.saw(step, x.abs().amax(1).numpy())
            read[name] = inputs[0]

        return record

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            for done, (at, feeds) in enumerate(items):
                step = at
                read.clear()
                module(**tensors(feeds))
                progress(done + 1)
    finally:
        for handle in handles:
            handle.remove()
    for name, tensor in read.items():
        found[name].readers = tuple(other for other, same in read.items() if same is tensor)
    return found


def tensors(feeds: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """As the network in float32 takes them, whatever the bundle's number format is."""
    given = {name: torch.from_numpy(np.asarray(array)) for name, array in feeds.items()}
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in given.items()}


def _add(channels: Channels, x: torch.Tensor) -> None:
    """``x`` is [channels, values]."""
    channels.add(x.amin(1).numpy(), x.amax(1).numpy(), x.double().square().sum(1).numpy(), x.shape[1])


def _new(layer: torch.nn.Module, inputs: int, outputs: int) -> Observed:
    assert isinstance(layer, LAYERS)
    groups = layer.groups if isinstance(layer, torch.nn.Conv2d) else 1
    weight = layer.weight.detach()
    return Observed(lambda: weight.float().numpy(), groups, Channels.none(inputs), Channels.none(outputs))
