"""What each layer's quantization does to the guided prediction, all layers in a few passes.

Let d be what quantizing layer l alone adds to its output y_l, and J the derivative of the guided prediction p by y_l. To first
order p changes by J d. For a random v with independent standard normal entries, E (v . J d)^2 = |J d|^2 (Hutchinson's estimator),
and v . J d = (dv.p / dy_l) . d: one backward pass gives it for every layer at once. So the cost is that of ``probes`` + 2 passes
for each item, however many layers there are; one layer at a time would be a pass for each. How near it comes to the errors
that are measured layer by layer: docs/sensitivity.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from edgediffusion.bundle import Bundle, Component
from edgediffusion.optimize.integers import affine, channel_affine
from edgediffusion.optimize.observe import tensors
from edgediffusion.optimize.prepare import prepare_module
from edgediffusion.optimize.recipe import Placement, Recipe
from edgediffusion.optimize.simulate import NearestLayer
from edgediffusion.optimize.state import LayerState

Feeds = Mapping[str, np.ndarray]
PROBES = 4  # random directions for each item: docs/sensitivity.md has what fewer and more do


class QuantizedLayer(NearestLayer):
    """A layer as the graph has it: with the state's own codes and bias where it has some, and a quantized output where asked for."""

    def __init__(self, layer: torch.nn.Module, state: LayerState, bits: tuple[int, int], output: Placement | None):
        super().__init__(layer, state, bits)
        self.given = None if state.codes is None else torch.from_numpy(state.codes).float() * self.weight_step
        if state.bias is not None:
            self.bias = torch.nn.Parameter(torch.from_numpy(state.bias).float())
        self.output = None if output is None else _output_quantizer(state, output)

    def read_weight(self) -> torch.Tensor:
        return super().read_weight() if self.given is None else self.given

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        if self.output is None:
            return y
        step, zero, low, high = self.output
        read: torch.Tensor = (torch.clamp(torch.round(y / step) + zero, low, high) - zero) * step
        return read


def _output_quantizer(state: LayerState, placement: Placement) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """Steps and zero points, shaped for [batch, channels, h, w], and the codes' ends: as passes/insert_qdq.py writes them."""
    signed = placement.activations == "int8"
    if placement.channel_scales and not signed:
        steps, zeros = channel_affine(state.output_low * state.output_clip, state.output_high * state.output_clip, 8)
        low, high = 0.0, 255.0
    else:
        one = affine(*state.output_range(), 8, signed=signed)
        steps, zeros, low, high = np.array([one.scale], np.float32), np.array([one.zero]), one.lowest, one.highest
    return torch.from_numpy(steps).view(-1, 1, 1), torch.from_numpy(zeros).float().view(-1, 1, 1), low, high


def layer_errors(
    module: torch.nn.Module,
    items: Sequence[Feeds],
    layers: Mapping[str, torch.nn.Module],
    *,
    guidance_scale: float | None = None,
    probes: int = PROBES,
    seed: int = 0,
    progress: Callable[[float], None] = lambda part: None,
) -> dict[str, float]:
    """For each of ``layers``, by module path, the relative change of the guided prediction when it alone is quantized.

    ``layers`` are the quantized forms of modules of ``module``, ``QuantizedLayer`` for instance. ``items`` are inputs by name; with
    ``guidance_scale`` those of two rows, the unconditional one first, give u + g (c - u). A layer that no item reaches, or that
    the prediction does not depend on, has the error 0.
    """
    squares: dict[str, float] = dict.fromkeys(layers, 0.0)
    norm = 0.0
    generator = torch.Generator().manual_seed(seed)
    for done, item in enumerate(items):
        deltas, outputs, prediction = _changes(module, item, layers, guidance_scale)
        norm += float(prediction.detach().double().square().sum())
        for probe in range(probes):
            v = torch.randn(prediction.shape, generator=generator)
            last = probe == probes - 1
            slopes = torch.autograd.grad((v * prediction).sum(), outputs, retain_graph=not last, allow_unused=True)
            moved: dict[str, float] = {}
            for (name, delta), slope in zip(deltas, slopes, strict=True):
                if slope is not None:
                    moved[name] = moved.get(name, 0.0) + float((slope.double() * delta).sum())
            for name, change in moved.items():
                squares[name] += change**2 / probes
        progress((done + 1) / len(items))
    return {name: math.sqrt(square / max(norm, 1e-30)) for name, square in squares.items()}


def _changes(
    module: torch.nn.Module, item: Feeds, layers: Mapping[str, torch.nn.Module], guidance_scale: float | None
) -> tuple[list[tuple[str, torch.Tensor]], list[torch.Tensor], torch.Tensor]:
    """What quantizing adds to each layer's output, by call; the outputs, with gradients; and the guided prediction."""
    deltas: list[tuple[str, torch.Tensor]] = []
    outputs: list[torch.Tensor] = []

    def hook(name: str) -> Callable[..., torch.Tensor]:
        def record(_layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                deltas.append((name, (layers[name](inputs[0]) - output).double()))
            leaf = output if output.requires_grad else output.detach().requires_grad_()
            outputs.append(leaf)
            return leaf.clone()  # so that what follows may change it in place

        return record

    handles = [module.get_submodule(name).register_forward_hook(hook(name)) for name in layers]
    frozen = [p for p in module.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            prediction = guided(module(**tensors(item)), guidance_scale)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in frozen:
            parameter.requires_grad_(True)
    return deltas, outputs, prediction


@dataclass(frozen=True)
class Quantization:
    """What is simulated: ``layers`` are those that are quantized, ``outputs`` those of them whose output is quantized too, by the
    names of ``states``."""

    states: Mapping[str, LayerState]
    recipe: Recipe
    placement: Placement
    layers: Collection[str]
    outputs: Collection[str]


def errors_of_source(
    bundle: Bundle,
    component: Component,
    source: Path,
    items: Sequence[Feeds],
    quantization: Quantization,
    *,
    guidance_scale: float | None,
    probes: int = PROBES,
    progress: Callable[[float], None] = lambda part: None,
) -> dict[str, float]:
    """``layer_errors`` of the network that a bundle's component was exported from, read from its ``source`` (SourceError)."""
    from edgediffusion.export.families import family_of
    from edgediffusion.export.source import Source

    origin = Source.open(source)
    part = next(p for p in family_of(origin)[1].parts(origin) if p.name == component.name)
    network = origin.load(part.network)
    module = part.wrap(network)
    prefix = next(f"{name}." for name, child in module.named_children() if child is network)
    prepare_module(module, bundle.path / component.model, quantization.recipe, prefix)
    layers = quantized_layers(module, quantization, prefix)
    found = layer_errors(module, items, layers, guidance_scale=guidance_scale, probes=probes, progress=progress)
    return {name.removeprefix(prefix): error for name, error in found.items()}


def guided(prediction: torch.Tensor, guidance_scale: float | None) -> torch.Tensor:
    """u + g (c - u) of two rows; other predictions as they are."""
    if guidance_scale is None or len(prediction) != 2:
        return prediction
    return prediction[:1] + guidance_scale * (prediction[1:] - prediction[:1])


def quantized_layers(module: torch.nn.Module, quantization: Quantization, prefix: str = "") -> dict[str, torch.nn.Module]:
    """The quantized form of each layer, by module path, which has ``prefix`` before the names."""
    recipe, placement = quantization.recipe, quantization.placement
    return {
        prefix + name: QuantizedLayer(
            module.get_submodule(prefix + name),
            quantization.states[name],
            recipe.bits(name),
            placement if name in quantization.outputs else None,
        )
        for name in quantization.layers
    }
