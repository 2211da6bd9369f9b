"""Insert explicit QuantizeLinear / DequantizeLinear nodes around the layers that a recipe quantizes.

    x ─ Conv(w) ─ y          becomes    x ─ Q ─ DQ ─ Conv(w8 ─ DQ) ─ Q ─ DQ ─ y
    x ─ MatMul(w) ─ y        becomes    x ─ Q ─ DQ ─ MatMul(w8 ─ DQ) ─ y

A layer is a Conv, MatMul or Gemm whose weight is an initializer, seen through (1) a Cast, because a float32 graph may
keep its weights in float16, and (2) a Transpose, because torch stores a linear layer as [out, in]. Weights become
symmetric int8 with one scale for each output channel, s = amax / 127; activations have one scale for a tensor, with a
zero point if the placement asks for unsigned ones. A tensor that several layers read is quantized once. Every Q and DQ
has a scale and a zero point of its own: ONNX Runtime's graph rewriting does not expect to share them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgediffusion.optimize.recipe import Placement, Recipe
from edgediffusion.optimize.state import LayerRanges, TensorRange

LAYER_OPS = ("Conv", "MatMul", "Gemm")


@dataclass(frozen=True)
class Report:
    """Layers that were quantized, and those that were not with the reason."""

    quantized: tuple[str, ...]
    declined: Mapping[str, str]


@dataclass(frozen=True)
class _Layer:
    name: str
    node: ir.Node
    weight: ir.Value
    transposed: bool
    dtype: ir.DataType  # that the node computes in


def insert_qdq(model: ir.Model, ranges: Mapping[str, LayerRanges], recipe: Recipe, placement: Placement) -> Report:
    """Quantize ``model`` in place. ``ranges`` is keyed by layer: the name of its weight without ``.weight``."""
    quantized, declined = [], {}
    writer = _Writer(model.graph, placement)
    for layer in _layers(model.graph):
        reason = _declines(layer, ranges, recipe, placement)
        if reason:
            declined[layer.name] = reason
            continue
        writer.quantize(layer, ranges[layer.name])
        quantized.append(layer.name)
    _drop_unused(model.graph)
    return Report(tuple(quantized), declined)


def quantize_weight(weight: np.ndarray, amax: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 of a weight [out, ...] and its float32 scales [out]; rounds half to even, as ONNX and torch do."""
    scale = np.maximum(amax.astype(np.float32), np.float32(1e-8)) / np.float32(127)
    steps = weight.astype(np.float32) / scale.reshape(-1, *[1] * (weight.ndim - 1))
    return np.clip(np.rint(steps), -127, 127).astype(np.int8), scale


def activation_scale(bounds: TensorRange, kind: str) -> tuple[np.float32, np.ndarray]:
    """Scale and zero point of an activation; the range always contains zero, so that zero stays exact.

    ``int8``: symmetric, amax / 127, zero point 0. ``uint8``: the observed range within [-amax, amax].
    """
    if kind == "int8":
        return np.float32(max(bounds.amax, 1e-8) / 127), np.array(0, np.int8)
    low, high = min(0.0, max(bounds.low, -bounds.amax)), max(0.0, min(bounds.high, bounds.amax))
    scale = max(high - low, 1e-8) / 255
    return np.float32(scale), np.array(np.clip(np.rint(-low / scale), 0, 255), np.uint8)


def _layers(graph: ir.Graph) -> list[_Layer]:
    found = []
    for node in graph:
        if node.op_type not in LAYER_OPS or node.domain not in ("", "ai.onnx"):
            continue
        value, transposed, dtype = node.inputs[1], False, None
        while value is not None and not value.is_initializer():
            producer = value.producer()
            if producer is None or producer.op_type not in ("Cast", "Transpose"):
                break
            transposed ^= producer.op_type == "Transpose"
            if producer.op_type == "Cast" and dtype is None:
                dtype = ir.DataType(producer.attributes["to"].as_int())
            value = producer.inputs[0]
        if value is not None and value.is_initializer() and value.name is not None and value.name.endswith(".weight"):
            own = value.const_value.dtype if value.const_value is not None else ir.DataType.FLOAT
            found.append(_Layer(value.name.removesuffix(".weight"), node, value, transposed, dtype or own))
    return found


def _declines(layer: _Layer, ranges: Mapping[str, LayerRanges], recipe: Recipe, placement: Placement) -> str | None:
    if layer.node.op_type not in placement.inputs:
        return f"the placement '{placement.name}' does not quantize {layer.node.op_type}"
    if expression := recipe.excludes(layer.name):
        return f"the recipe keeps '{expression}' float"
    if layer.name not in ranges:
        return "the calibration has no ranges for it"
    return None


class _Writer:
    """Adds nodes and initializers to one graph; remembers which tensors are quantized already."""

    def __init__(self, graph: ir.Graph, placement: Placement):
        self.graph, self.placement = graph, placement
        self.activations: dict[ir.Value, ir.Value] = {}
        self.weights: dict[tuple[str, int], ir.Value] = {}

    def quantize(self, layer: _Layer, bounds: LayerRanges) -> None:
        node = layer.node
        source = node.inputs[0]
        assert source is not None
        if source not in self.activations:
            self.activations[source] = self._activation(source, bounds.input, layer.dtype, before=node)
        node.replace_input_with(0, self.activations[source])
        node.replace_input_with(1, self._weight(layer, bounds))
        if node.op_type in self.placement.outputs:
            output = node.outputs[0]
            uses = list(output.uses())
            quantized = self._activation(output, bounds.output, layer.dtype, after=node)
            self.activations[output] = quantized
            for use in uses:
                use.node.replace_input_with(use.idx, quantized)

    def _activation(
        self, value: ir.Value, bounds: TensorRange, dtype: ir.DataType, *, before: ir.Node | None = None, after: ir.Node | None = None
    ) -> ir.Value:
        scale, zero = activation_scale(bounds, self.placement.activations)
        scale = scale.astype(dtype.numpy())
        q = ir.node("QuantizeLinear", [value, *self._scales(f"{value.name}.q", scale, zero)])
        dq = ir.node("DequantizeLinear", [q.outputs[0], *self._scales(f"{value.name}.dq", scale, zero)])
        q.outputs[0].name, dq.outputs[0].name = f"{value.name}.quantized", f"{value.name}.dequantized"
        dq.outputs[0].dtype, dq.outputs[0].shape = dtype, value.shape
        if after is not None:
            self.graph.insert_after(after, [q, dq])
        elif before is not None:
            self.graph.insert_before(before, [q, dq])
        return dq.outputs[0]

    def _weight(self, layer: _Layer, bounds: LayerRanges) -> ir.Value:
        tensor = layer.weight.const_value
        assert tensor is not None
        weight, scale = quantize_weight(tensor.numpy(), np.asarray(bounds.weight_amax))
        axis = _output_axis(layer)
        if layer.transposed:
            weight = np.ascontiguousarray(weight.T)
        key = (layer.name, axis)
        if key not in self.weights:
            name = f"{layer.name}.weight"
            q = self._constant(f"{name}.int8" + (".transposed" if layer.transposed else ""), weight)
            scales = self._scales(f"{name}.dq", scale.astype(layer.dtype.numpy()), np.zeros(scale.shape, np.int8))
            dq = ir.node("DequantizeLinear", [q, *scales], attributes={"axis": axis})
            dq.outputs[0].name = f"{name}.dequantized"
            dq.outputs[0].dtype, dq.outputs[0].shape = layer.dtype, ir.Shape(weight.shape)
            self.graph.insert_before(layer.node, [dq])
            self.weights[key] = dq.outputs[0]
        return self.weights[key]

    def _scales(self, name: str, scale: np.ndarray | np.generic, zero: np.ndarray) -> tuple[ir.Value, ir.Value]:
        return self._constant(f"{name}.scale", np.asarray(scale)), self._constant(f"{name}.zero_point", zero)

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        self.graph.register_initializer(value)
        return value


def _output_axis(layer: _Layer) -> int:
    """The axis of the output channels in the weight as the node reads it."""
    if layer.node.op_type == "Conv":
        return 0
    rank = layer.weight.shape.rank() if layer.weight.shape is not None else 2
    return rank - 1 if layer.transposed else 0


def _drop_unused(graph: ir.Graph) -> None:
    """Remove what only served the float weights: their casts, transposes and initializers."""
    kept = set(graph.outputs)
    for node in reversed(list(graph)):
        if not any(output.uses() or output in kept for output in node.outputs):
            graph.remove(node, safe=True)
    for name in [name for name, value in graph.initializers.items() if not value.uses() and value not in kept]:
        del graph.initializers[name]
