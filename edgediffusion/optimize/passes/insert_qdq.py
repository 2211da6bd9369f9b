"""Insert explicit QuantizeLinear / DequantizeLinear nodes around the layers that a recipe quantizes.

    x ─ Conv(w) ─ y          becomes    x ─ Q ─ DQ ─ Conv(w8 ─ DQ) ─ Q ─ DQ ─ y
    x ─ MatMul(w) ─ y        becomes    x ─ Q ─ DQ ─ MatMul(w8 ─ DQ) ─ y

Layers are those that graph_layers.py finds. Weights are symmetric with one scale for each output channel; activations have
one scale for a tensor, with a zero point if the placement asks for unsigned ones. Every Q and DQ has a scale and a zero
point of its own: ONNX Runtime's graph rewriting does not expect to share them.

Where channels are balanced by factors f, x is multiplied by 1 / f before Q, and the weight is f w. A Q with the scales s f_c would do
the same without a product, but where channels lie innermost (in matrix products, and in convolutions once an engine has turned them)
ONNX Runtime's kernel for it is called for each single value: 285 ms for what both take 4 ms for (benchmarks/sd15.py).

Outputs have a scale for each channel where the placement allows ``channel_scales``: the weight and bias are divided by the channel's
step d_o and the zero point z_o added to the bias, so Q has scale 1 and zero point 0; DQ has the scales d_o and the zero points z_o.
Every output channel uses all of its 256 codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgediffusion.optimize.graph_layers import Layer, find_layers, is_constant
from edgediffusion.optimize.integers import E4M3_MAX, Affine, affine, channel_affine, e4m3_scale, spread, weight_codes, weight_scale
from edgediffusion.optimize.passes._nodes import constant, drop_unread
from edgediffusion.optimize.recipe import BITS, Placement, Recipe
from edgediffusion.optimize.state import LayerState

_FLOAT8 = ir.DataType.FLOAT8E4M3FN


@dataclass(frozen=True)
class Report:
    """Layers that were quantized, and those that were not with the reason."""

    quantized: tuple[str, ...]
    declined: Mapping[str, str]


def insert_qdq(model: ir.Model, states: Mapping[str, LayerState], recipe: Recipe, placement: Placement) -> Report:
    """Quantize ``model`` in place. ``states`` is keyed by layer (see ``graph_layers``)."""
    quantized, declined = [], {}
    writer = _Writer(model.graph, placement)
    for layer in find_layers(model.graph):
        reason = _declines(layer, states, recipe, placement)
        if reason:
            declined[layer.name] = reason
            continue
        writer.quantize(layer, states[layer.name], *recipe.formats(layer.name))
        quantized.append(layer.name)
    _drop_unused(model.graph)
    return Report(tuple(quantized), declined)


def _declines(layer: Layer, states: Mapping[str, LayerState], recipe: Recipe, placement: Placement) -> str | None:
    if layer.node.op_type not in placement.inputs:
        return f"the placement '{placement.name}' does not quantize {layer.node.op_type}"
    if expression := recipe.excludes(layer.name):
        return f"the recipe keeps '{expression}' float"
    if layer.name not in states:
        return "the calibration did not reach it"
    if states[layer.name].is_constant:
        return "its input never changed in the calibration, and a range of no width has no scale"
    return None


class _Writer:
    """Adds nodes and initializers to one graph; remembers which tensors are quantized already."""

    def __init__(self, graph: ir.Graph, placement: Placement):
        self.graph, self.placement = graph, placement
        self.activations: dict[tuple[object, ...], ir.Value] = {}
        self.weights: dict[tuple[str, bool], ir.Value] = {}
        self.names: dict[str, int] = {}

    def quantize(self, layer: Layer, state: LayerState, weights: str, activations: str) -> None:
        node = layer.node
        node.replace_input_with(0, self._input(layer, state, activations))
        steps = None
        given = any(output is node.outputs[0] for output in self.graph.outputs)  # to the caller, who wants it as it is
        if activations == "int8" and node.op_type in self.placement.outputs and not given:
            steps = self._output(layer, state)
        elif state.bias is not None:
            self._set_bias(layer, state.bias)
        node.replace_input_with(1, self._weight(layer, state, weights, self._weight_kind(weights, activations), steps))

    def _input(self, layer: Layer, state: LayerState, kind: str) -> ir.Value:
        """The layer's input divided by the factors, quantized and read back."""
        source = layer.node.inputs[0]
        assert source is not None
        key = (source, kind, state.factors.tobytes(), *state.input_range())
        if key not in self.activations:
            value = self._divided(source, state.factors, layer) if (state.factors != 1).any() else source
            if kind != "float":
                value = self._pair(value, layer, self._quantizer(state.input_range(), kind), kind)
            self.activations[key] = value
        return self.activations[key]

    def _divided(self, value: ir.Value, factors: np.ndarray, layer: Layer) -> ir.Value:
        shape = (-1, 1, 1) if layer.axis == 1 else (-1,)
        inverse = (1 / factors.astype(np.float64)).reshape(shape).astype(layer.dtype.numpy())
        product = ir.node("Mul", [value, self._constant(f"{value.name}.balance", inverse)])
        return self._made(product, f"{value.name}.balanced", value, layer.dtype, before=layer.node)

    def _quantizer(self, bounds: tuple[float, float], kind: str) -> Affine:
        if kind == "fp8":
            return Affine(float(e4m3_scale(max(abs(bound) for bound in bounds))), 0, -E4M3_MAX, E4M3_MAX)
        return affine(*bounds, BITS[kind], signed=self._signed)

    def _pair(self, value: ir.Value, layer: Layer, quantizer: Affine, kind: str) -> ir.Value:
        """Q and DQ with one scale."""
        code = _FLOAT8 if kind == "fp8" else ir.DataType[("" if self._signed else "U") + kind.upper()]
        parameters = (np.array(quantizer.scale, np.float32), np.array(quantizer.zero))
        q = self._node("QuantizeLinear", value, parameters, code, layer, layer.axis)
        self._made(q, f"{value.name}.quantized", value, code, before=layer.node)
        dq = self._node("DequantizeLinear", q.outputs[0], parameters, code, layer, layer.axis)
        return self._made(dq, f"{value.name}.dequantized", value, layer.dtype, before=layer.node)

    def _output(self, layer: Layer, state: LayerState) -> np.ndarray | None:
        """Quantize what the layer gives. With scales by channel, returns the steps [out] that its weight is divided by."""
        node, output = layer.node, layer.node.outputs[0]
        uses = list(output.uses())
        code = ir.DataType.INT8 if self._signed else ir.DataType.UINT8
        if self.placement.channel_scales and not self._signed:
            steps, zeros = channel_affine(state.output_low * state.output_clip, state.output_high * state.output_clip, 8)
            bias = state.bias if state.bias is not None else self._bias(layer)
            self._set_bias(layer, bias / steps + zeros)
            into, outof = (np.ones(()), np.zeros(())), (steps, zeros)
        else:
            steps = None
            quantizer = affine(*state.output_range(), 8, signed=self._signed)
            into = outof = (np.array(quantizer.scale), np.array(quantizer.zero))
        q = self._node("QuantizeLinear", output, into, code, layer, layer.axis)
        self._made(q, f"{output.name}.quantized", output, code, after=node)
        dq = self._node("DequantizeLinear", q.outputs[0], outof, code, layer, layer.axis)
        read = self._made(dq, f"{output.name}.dequantized", output, layer.dtype, after=q)
        for use in uses:
            use.node.replace_input_with(use.idx, read)
        return steps

    def _bias(self, layer: Layer) -> np.ndarray:
        """float64 [out]."""
        inputs = layer.node.inputs
        bias = inputs[2] if len(inputs) > 2 else None
        return np.zeros(1) if bias is None else _constant_of(bias).astype(np.float64)

    def _set_bias(self, layer: Layer, values: np.ndarray) -> None:
        """A learned or scaled bias; a matrix product has its own in the Add behind it, or none."""
        node, bias = layer.node, self._constant(f"{layer.name}.bias.learned", values.astype(layer.dtype.numpy()))
        if node.op_type == "MatMul":
            self._add_bias(layer, bias)
            return
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, bias)

    def _add_bias(self, layer: Layer, bias: ir.Value) -> None:
        output = layer.node.outputs[0]
        uses = list(output.uses())
        if len(uses) == 1 and uses[0].node.op_type == "Add":
            other = uses[0].node.inputs[1 - uses[0].idx]
            if other is not None and other.shape == bias.shape and is_constant(other):
                uses[0].node.replace_input_with(1 - uses[0].idx, bias)
                return
        added = ir.node("Add", [output, bias])
        total = self._made(added, f"{output.name}.biased", output, layer.dtype, after=layer.node)
        for use in uses:
            use.node.replace_input_with(use.idx, total)

    def _weight_kind(self, weights: str, activations: str) -> str:
        """What the weight is stored as: 4-bit codes beside integers of 8 bits as the engine's kernels for these take them."""
        return self.placement.int4 if weights == "int4" and activations != "float" else weights

    def _weight(self, layer: Layer, state: LayerState, weights: str, stored: str, steps: np.ndarray | None) -> ir.Value:
        """The weight's codes and the node that reads them; ``stored`` is the number format of the codes in the file."""
        key = (layer.name, layer.transposed)
        if key in self.weights:
            return self.weights[key]
        scale = e4m3_scale(state.weight_amax) if weights == "fp8" else weight_scale(state.weight_amax, BITS[weights])
        kind = _FLOAT8 if stored == "fp8" else ir.DataType[stored.upper()]
        name = f"{layer.name}.weight"
        assert layer.weight.const_value is not None
        shape = tuple(layer.weight.const_value.shape.numpy())
        shape = shape[::-1] if layer.transposed != layer.turned else shape  # of the codes, as the node reads them
        q = self._later(
            f"{name}.codes" + (".transposed" if layer.transposed else ""),
            lambda: _codes(layer, state, weights, layer.transposed).astype(kind.numpy()),
            kind,
            shape,
        )
        scale = scale.T if layer.transposed else scale
        read = np.ascontiguousarray(scale if steps is None else scale / steps).astype(np.float32)
        axis = _output_axis(layer)
        if scale.ndim == 2:  # groups of inputs
            axis = 1 - axis
        dq = self._node("DequantizeLinear", q, (read, np.zeros(read.shape)), kind, layer, axis, name=name)
        if scale.ndim == 2:
            dq.attributes["block_size"] = ir.AttrInt64("block_size", shape[axis] // read.shape[axis])
        self.weights[key] = self._made(dq, f"{name}.dequantized", q, layer.dtype, before=layer.node)
        return self.weights[key]

    @property
    def _signed(self) -> bool:
        return self.placement.activations == "int8"

    def _node(
        self,
        kind: str,
        value: ir.Value,
        parameters: tuple[np.ndarray, np.ndarray],
        code: ir.DataType,
        layer: Layer,
        axis: int,
        *,
        name: str = "",
    ) -> ir.Node:
        """A Q or DQ node; ``parameters`` are its scale and zero point."""
        scale, zero = parameters
        stem = f"{name or value.name}.{'q' if kind == 'QuantizeLinear' else 'dq'}"
        scales = self._constant(f"{stem}.scale", scale.astype(layer.dtype.numpy()))
        zeros = self._constant(f"{stem}.zero_point", zero.astype(code.numpy()))
        return ir.node(kind, [value, scales, zeros], attributes={"axis": axis} if scale.ndim else {})

    def _made(
        self,
        node: ir.Node,
        name: str,
        like: ir.Value,
        dtype: ir.DataType,
        *,
        before: ir.Node | None = None,
        after: ir.Node | None = None,
    ) -> ir.Value:
        """Put a node into the graph; returns its output, named and shaped like ``like``."""
        output = node.outputs[0]
        output.name, output.shape = self._unused(name), like.shape
        output.dtype = dtype
        if before is not None:
            self.graph.insert_before(before, [node])
        elif after is not None:
            self.graph.insert_after(after, [node])
        return output

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        return constant(self.graph, self._unused(name), array)

    def _later(self, name: str, values: Callable[[], np.ndarray], dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
        """A constant that is computed when it is written, and not kept: a network's weights need not fit into memory."""
        name = self._unused(name)
        tensor = ir.LazyTensor(lambda: ir.tensor(values(), name=name), dtype, ir.Shape(shape), name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.graph.register_initializer(value)
        return value

    def _unused(self, name: str) -> str:
        """The name, numbered where it is taken: one tensor may be quantized in several ways."""
        taken = self.names.get(name, 0)
        self.names[name] = taken + 1
        return f"{name}.{taken}" if taken else name


def _codes(layer: Layer, state: LayerState, weights: str, transposed: bool) -> np.ndarray:
    """Codes [out, in, ...] of the layer's weight, or [in, out] where they are ``transposed``."""
    codes = state.codes
    if codes is None:
        weight = layer.read_weight()
        if weight.ndim > 1 and weight.shape[1] == len(state.factors):
            weight = weight * state.factors.reshape(1, -1, *[1] * (weight.ndim - 2))
        weight = state.without_branch(weight)
        if weights == "fp8":
            codes = np.clip(weight / spread(e4m3_scale(state.weight_amax), weight.shape), -E4M3_MAX, E4M3_MAX)
        else:
            codes = weight_codes(weight, weight_scale(state.weight_amax, BITS[weights]), BITS[weights])
    return np.ascontiguousarray(codes.T) if transposed else codes


def _constant_of(value: ir.Value) -> np.ndarray:
    """An initializer seen through a Cast."""
    producer = value.producer()
    if producer is not None and producer.op_type == "Cast" and producer.inputs[0] is not None:
        value = producer.inputs[0]
    assert value.const_value is not None, value.name
    return value.const_value.numpy()


def _output_axis(layer: Layer) -> int:
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
    drop_unread(graph)
