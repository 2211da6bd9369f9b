"""What the layers of a network see: statistics of every convolution's and linear layer's input and output, by channel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from edgediffusion.errors import ArgumentError

LAYERS = (torch.nn.Conv2d, torch.nn.Linear)


@dataclass
class Channels:
    """Lowest and highest value of each channel, and the mean of its squares; float32 [channels]."""

    low: torch.Tensor
    high: torch.Tensor
    squares: torch.Tensor
    count: int = 0

    @classmethod
    def none(cls, channels: int) -> Channels:
        return cls(torch.full((channels,), torch.inf), torch.full((channels,), -torch.inf), torch.zeros(channels, dtype=torch.float64))

    def add(self, x: torch.Tensor) -> None:
        """``x`` is [channels, values]."""
        self.low = torch.minimum(self.low, x.amin(1))
        self.high = torch.maximum(self.high, x.amax(1))
        self.squares = self.squares + x.double().square().sum(1)
        self.count += x.shape[1]

    @property
    def amax(self) -> np.ndarray:
        return np.asarray(torch.maximum(self.low.abs(), self.high.abs()).numpy())

    @property
    def mean_square(self) -> np.ndarray:
        return np.asarray((self.squares / max(self.count, 1)).numpy())


@dataclass
class Observed:
    """One layer. ``weight`` is float32 [out, in, ...]; ``steps`` has amax of the input's channels for each sampling step."""

    weight: np.ndarray
    bias: bool
    groups: int
    input: Channels
    output: Channels
    steps: dict[int, np.ndarray] = field(default_factory=dict)
    readers: tuple[str, ...] = ()  # all layers that read the same tensor, this one among them


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
                raise ArgumentError(
                    f"The layer '{name}' gives values that are no finite numbers at sampling step {step}",
                    got="NaN or infinity",
                    do="Check the weights, and the number format they were saved in.",
                )
            seen = found.setdefault(name, _new(layer, len(x), len(y)))
            seen.input.add(x)
            seen.output.add(y)
            largest = x.abs().amax(1).numpy()
            seen.steps[step] = np.maximum(seen.steps[step], largest) if step in seen.steps else largest
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


def _new(layer: torch.nn.Module, inputs: int, outputs: int) -> Observed:
    assert isinstance(layer, LAYERS)
    groups = layer.groups if isinstance(layer, torch.nn.Conv2d) else 1
    weight = layer.weight.detach().float().numpy()
    return Observed(weight, layer.bias is not None, groups, Channels.none(inputs), Channels.none(outputs))
