"""Quantized layers in torch with gradients: what the Q/DQ graph computes, so that its parameters can be learned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from edgediffusion.optimize.integers import affine, weight_scale
from edgediffusion.optimize.observe import LAYERS
from edgediffusion.optimize.state import LayerState

# The rectified sigmoid of AdaRound (Nagel et al. 2020, 2004.10568, equation 23): h = clip(1.2 sigmoid(a) - 0.1, 0, 1).
STRETCH, SHIFT = 1.2, -0.1


class SimulatedLayer(torch.nn.Module):
    """One convolution or linear layer with quantized input and weight.

    Learned are ``rounding`` (AdaRound's a, shaped like the weight), ``log_step`` (the logarithm of the input's step over
    its first value, LSQ) and ``bias``. Inputs outside the range pass their gradient to the step alone.
    """

    def __init__(self, layer: torch.nn.Module, state: LayerState, bits: tuple[int, int]):
        super().__init__()
        assert isinstance(layer, LAYERS)
        self.layer: Any = layer
        is_conv = isinstance(layer, torch.nn.Conv2d)
        weight_bits, self.activation_bits = bits
        axes = (1, -1, 1, 1) if is_conv else (-1,)
        factors = torch.from_numpy(state.factors)
        self.factors = factors.view(axes)
        grouped = isinstance(layer, torch.nn.Conv2d) and layer.groups > 1
        weight = layer.weight.detach().float()
        self.weight = weight if grouped else weight * factors.view(1, -1, *[1] * (weight.ndim - 2))
        self.step_w = torch.from_numpy(weight_scale(state.weight_amax, weight_bits)).view(-1, *[1] * (weight.ndim - 1))
        self.top = 2 ** (weight_bits - 1) - 1
        if self.activation_bits < 16:
            self.quantizer = affine(*state.input_range(), self.activation_bits, signed=False)
        self.floor = torch.clamp(torch.floor(self.weight / self.step_w), -self.top, self.top)
        rest = torch.clamp(self.weight / self.step_w - self.floor, 0, 1)
        self.rounding = torch.nn.Parameter(initial_rounding(rest))
        self.log_step = torch.nn.Parameter(torch.zeros(()))
        self.bias = torch.nn.Parameter(torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach().float().clone())
        self.hard = False

    def part_up(self) -> torch.Tensor:
        """h: the part of the way from the lower code to the upper one, 0..1; 0 or 1 once hard."""
        soft = torch.clamp(STRETCH * torch.sigmoid(self.rounding) + SHIFT, 0, 1)
        return (self.rounding >= 0).to(soft.dtype) if self.hard else soft

    def codes(self) -> np.ndarray:
        """int8, shaped like the weight."""
        rounded = torch.clamp(self.floor + (self.rounding >= 0), -self.top, self.top)
        return np.asarray(rounded.detach().to(torch.int8).numpy())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self._read(x.float() / self.factors) if self.activation_bits < 16 else x.float() / self.factors
        weight = torch.clamp(self.floor + self.part_up(), -self.top, self.top) * self.step_w
        if isinstance(self.layer, torch.nn.Linear):
            return F.linear(x, weight, self.bias)
        y: torch.Tensor = self.layer._conv_forward(x, weight, self.bias)
        return y

    def _read(self, x: torch.Tensor) -> torch.Tensor:
        q = self.quantizer
        step = q.scale * torch.exp(self.log_step)
        steps = x / step
        steps = steps + (torch.round(steps) - steps).detach()  # straight through
        read: torch.Tensor = torch.clamp(steps, q.lowest - q.zero, q.highest - q.zero) * step
        return read


def initial_rounding(rest: torch.Tensor) -> torch.Tensor:
    """a with h(a) = rest: a = -ln(1.2 / (rest + 0.1) - 1)."""
    return -torch.log(STRETCH / (rest - SHIFT) - 1)


def rounding_loss(layer: SimulatedLayer, b: float) -> torch.Tensor:
    """sum (1 - |2 h - 1|^b), which pulls h to 0 or 1 (AdaRound, equation 24)."""
    return (1 - (2 * layer.part_up() - 1).abs().pow(b)).sum()


@contextmanager
def simulated(
    module: torch.nn.Module, states: Mapping[str, LayerState], bits: Mapping[str, tuple[int, int]]
) -> Iterator[dict[str, SimulatedLayer]]:
    """Put simulated layers into ``module``, by path, for the layers that ``bits`` names; the old ones return at the end."""
    replaced: list[tuple[torch.nn.Module, str, torch.nn.Module]] = []
    layers: dict[str, SimulatedLayer] = {}
    try:
        for name in bits:
            parent, _, last = name.rpartition(".")
            owner = module.get_submodule(parent)
            layer = owner.get_submodule(last)
            layers[name] = SimulatedLayer(layer, states[name], bits[name])
            replaced.append((owner, last, layer))
            setattr(owner, last, layers[name])
        yield layers
    finally:
        for owner, last, layer in replaced:
            setattr(owner, last, layer)


def anneal(done: float, *, start: float = 20.0, end: float = 2.0, warm_up: float = 0.2) -> float:
    """b of the rounding loss at a part 0..1 of all iterations: linear from start to end after the warm-up."""
    return start + (end - start) * max(0.0, done - warm_up) / (1 - warm_up)


def cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))
