"""Quantized layers in torch with gradients: what the Q/DQ graph computes, so that its parameters can be learned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
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
    """One convolution or linear layer with quantized input and weight; a subclass says how its weight is rounded.

    Learned are ``log_step``, the logarithm of the input's step over its first value (LSQ, Esser et al. 2020, 1902.08153), and
    ``bias``. Inputs outside the range pass their gradient to the step alone.
    """

    def __init__(self, layer: torch.nn.Module, state: LayerState, bits: tuple[int, int]):
        super().__init__()
        assert isinstance(layer, LAYERS)
        self.layer: Any = layer
        is_conv = isinstance(layer, torch.nn.Conv2d)
        weight_bits, self.activation_bits = bits
        factors = torch.from_numpy(state.factors)
        self.factors = factors.view((1, -1, 1, 1) if is_conv else (-1,))
        weight = layer.weight.detach().float()
        grouped = isinstance(layer, torch.nn.Conv2d) and layer.groups > 1
        self.weight = weight if grouped else weight * factors.view(1, -1, *[1] * (weight.ndim - 2))
        self.branch = None if state.up is None else (torch.from_numpy(state.up), torch.from_numpy(state.down))
        if self.branch is not None:
            self.weight = self.weight - self.branch[0] @ self.branch[1]
        self.weight_step = self._spread(torch.from_numpy(weight_scale(state.weight_amax, weight_bits)))
        self.top = 2 ** (weight_bits - 1) - 1
        if self.activation_bits < 16:
            self.quantizer = affine(*state.input_range(), self.activation_bits, signed=False)
        self.log_step = torch.nn.Parameter(torch.zeros(()))
        self.bias = torch.nn.Parameter(torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach().float().clone())

    def read_weight(self) -> torch.Tensor:
        """The weight as it is read from its codes, with gradients; shaped like the layer's."""
        raise NotImplementedError

    def _spread(self, steps: torch.Tensor) -> torch.Tensor:
        """Steps of output channels [out], or of groups of their inputs [out, groups], as they are broadcast to the weight."""
        if steps.ndim == 1:
            return steps.view(-1, *[1] * (self.weight.ndim - 1))
        return steps.repeat_interleave(self.weight.shape[1] // steps.shape[1], 1)

    def learned(self, state: LayerState) -> LayerState:
        """The state with what was learned."""
        step = float(torch.exp(self.log_step.detach()))
        return replace(state, codes=self.codes(), bias=self.bias.detach().numpy(), input_clip=state.input_clip * step)

    def codes(self) -> np.ndarray:
        """int8, shaped like the weight."""
        return np.asarray(torch.round(self.read_weight().detach() / self.weight_step).to(torch.int8).numpy())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        balanced = x.float() / self.factors
        x, weight = self._read(balanced) if self.activation_bits < 16 else balanced, self.read_weight()
        if isinstance(self.layer, torch.nn.Linear):
            whole = F.linear(x, weight, self.bias)
            return whole if self.branch is None else whole + F.linear(F.linear(balanced, self.branch[1]), self.branch[0])
        y: torch.Tensor = self.layer._conv_forward(x, weight, self.bias)
        return y

    def _read(self, x: torch.Tensor) -> torch.Tensor:
        q = self.quantizer
        step = q.scale * torch.exp(self.log_step)
        read: torch.Tensor = torch.clamp(round_through(x / step), q.lowest - q.zero, q.highest - q.zero) * step
        return read


class NearestLayer(SimulatedLayer):
    """Every weight at its nearest code, which is not learned."""

    def read_weight(self) -> torch.Tensor:
        return torch.clamp(torch.round(self.weight / self.weight_step), -self.top, self.top) * self.weight_step


class AdaRoundLayer(SimulatedLayer):
    """Every weight at the code below or above it. ``rounding`` is AdaRound's a, shaped like the weight; ``hard`` once chosen."""

    def __init__(self, layer: torch.nn.Module, state: LayerState, bits: tuple[int, int]):
        super().__init__(layer, state, bits)
        self.floor = torch.clamp(torch.floor(self.weight / self.weight_step), -self.top, self.top)
        rest = torch.clamp(self.weight / self.weight_step - self.floor, 0, 1)
        self.rounding = torch.nn.Parameter(initial_rounding(rest))
        self.hard = False

    def part_up(self) -> torch.Tensor:
        """h: the part of the way from the lower code to the upper one, 0..1; 0 or 1 once hard."""
        soft = torch.clamp(STRETCH * torch.sigmoid(self.rounding) + SHIFT, 0, 1)
        return (self.rounding >= 0).to(soft.dtype) if self.hard else soft

    def read_weight(self) -> torch.Tensor:
        return torch.clamp(self.floor + self.part_up(), -self.top, self.top) * self.weight_step

    def learned(self, state: LayerState) -> LayerState:
        self.hard = True
        return super().learned(state)


class StraightThroughLayer(SimulatedLayer):
    """Every weight at any code. ``latent`` is the weight in steps before it is rounded, ``log_weight_step`` the logarithm of
    each scale's step over its first value; rounding passes gradients on as they are."""

    def __init__(self, layer: torch.nn.Module, state: LayerState, bits: tuple[int, int]):
        super().__init__(layer, state, bits)
        self.latent = torch.nn.Parameter(self.weight / self.weight_step)
        self.log_weight_step = torch.nn.Parameter(torch.zeros(state.weight_amax.shape))

    def read_weight(self) -> torch.Tensor:
        read: torch.Tensor = round_through(torch.clamp(self.latent, -self.top, self.top))
        return read * (self.weight_step * self._spread(torch.exp(self.log_weight_step)))

    def codes(self) -> np.ndarray:
        return np.asarray(torch.round(torch.clamp(self.latent.detach(), -self.top, self.top)).to(torch.int8).numpy())

    def learned(self, state: LayerState) -> LayerState:
        wider = torch.exp(self.log_weight_step.detach()).numpy()
        return replace(super().learned(state), weight_amax=(state.weight_amax * wider).astype(np.float32))


def round_through(x: torch.Tensor) -> torch.Tensor:
    """Round to nearest with the gradient of no rounding (Bengio et al. 2013, 1308.3432)."""
    return x + (torch.round(x) - x).detach()


def initial_rounding(rest: torch.Tensor) -> torch.Tensor:
    """a with h(a) = rest: a = -ln(1.2 / (rest + 0.1) - 1)."""
    return -torch.log(STRETCH / (rest - SHIFT) - 1)


def rounding_loss(layer: AdaRoundLayer, b: float) -> torch.Tensor:
    """sum (1 - |2 h - 1|^b), which pulls h to 0 or 1 (AdaRound, equation 24)."""
    return (1 - (2 * layer.part_up() - 1).abs().pow(b)).sum()


@contextmanager
def simulated(
    module: torch.nn.Module,
    states: Mapping[str, LayerState],
    bits: Mapping[str, tuple[int, int]],
    kind: Callable[[tuple[int, int]], type[SimulatedLayer]] = lambda bits: NearestLayer,
) -> Iterator[dict[str, SimulatedLayer]]:
    """Put simulated layers into ``module`` for the layers that ``bits`` names, by path; the old ones return at the end."""
    replaced: list[tuple[torch.nn.Module, str, torch.nn.Module]] = []
    layers: dict[str, SimulatedLayer] = {}
    try:
        for name, widths in bits.items():
            parent, _, last = name.rpartition(".")
            owner = module.get_submodule(parent)
            layer = owner.get_submodule(last)
            layers[name] = kind(widths)(layer, states[name], widths)
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
