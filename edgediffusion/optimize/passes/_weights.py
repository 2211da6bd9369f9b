"""What a layer's weight is stored as: its codes, and the axes that they are read along."""

from __future__ import annotations

import numpy as np

from edgediffusion.optimize.graph_layers import Layer
from edgediffusion.optimize.integers import E4M3_MAX, e4m3_scale, spread, weight_codes, weight_scale
from edgediffusion.optimize.recipe import BITS
from edgediffusion.optimize.state import LayerState


def balanced(layer: Layer, state: LayerState) -> np.ndarray:
    """What is quantized of the layer's weight: f w [out, in, ...], less what a float branch computes."""
    weight = layer.read_weight()
    if weight.ndim > 1 and weight.shape[1] == len(state.factors):
        weight = weight * state.factors.reshape(1, -1, *[1] * (weight.ndim - 2))
    return state.without_branch(weight)


def codes_of(layer: Layer, state: LayerState, kind: str) -> np.ndarray:
    """Codes [out, in, ...] of int8, int4 or fp8."""
    if state.codes is not None:
        return state.codes
    weight = balanced(layer, state)
    if kind == "fp8":
        return np.asarray(np.clip(weight / spread(e4m3_scale(state.weight_amax), weight.shape), -E4M3_MAX, E4M3_MAX))
    return weight_codes(weight, weight_scale(state.weight_amax, BITS[kind]), BITS[kind])


def as_read(array: np.ndarray, layer: Layer) -> np.ndarray:
    """Something [out, in, ...] as the node reads the weight: [in, out] where it is transposed."""
    return np.ascontiguousarray(array.T) if layer.transposed else array


def shape_as_read(layer: Layer) -> tuple[int, ...]:
    assert layer.weight.const_value is not None
    shape = tuple(int(size) for size in layer.weight.const_value.shape.numpy())
    return shape[::-1] if layer.transposed != layer.turned else shape


def output_axis(layer: Layer) -> int:
    """The axis of the output channels in the weight as the node reads it; a matrix's other one is of the inputs."""
    if layer.node.op_type == "Conv":
        return 0
    return 1 if layer.transposed else 0
