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

Four-bit floating point is written by ``_float4.py``, products with ranges that are found at run time by ``_dynamic.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgediffusion.errors import ArgumentError
from edgediffusion.optimize.graph_layers import Layer, find_layers, is_constant
from edgediffusion.optimize.integers import E4M3_MAX, Affine, affine, channel_affine, e4m3_scale, weight_scale
from edgediffusion.optimize.passes import _float4
from edgediffusion.optimize.passes._additions import Additions
from edgediffusion.optimize.passes._dynamic import DynamicProducts, add_token_functions, dynamic_declines
from edgediffusion.optimize.passes._nodes import drop_unread
from edgediffusion.optimize.passes._simulation import add_functions
from edgediffusion.optimize.passes._weights import as_read, codes_of, output_axis, shape_as_read
from edgediffusion.optimize.recipe import BITS, FLOAT4, Placement, Recipe
from edgediffusion.optimize.state import LayerState

_FLOAT8 = ir.DataType.FLOAT8E4M3FN


@dataclass(frozen=True)
class Report:
    """Layers that were quantized, and those that were not with the reason."""

    quantized: tuple[str, ...]
    declined: Mapping[str, str]


def insert_qdq(model: ir.Model, states: Mapping[str, LayerState], recipe: Recipe, placement: Placement) -> Report:
    """Quantize ``model`` in place. ``states`` is keyed by layer (see ``graph_layers``).

    Raises:
        ArgumentError: the graph's opset has no such number format.
    """
    _check_opset(model, recipe, placement)
    quantized, declined = [], {}
    writer = _Writer(model.graph, placement, recipe.dynamic)
    for layer in find_layers(model.graph):
        reason = _declines(layer, states, recipe, placement)
        if reason:
            declined[layer.name] = reason
            continue
        writer.quantize(layer, states[layer.name], *_formats(layer, states, recipe))
        quantized.append(layer.name)
    writer.add_functions(model)
    _drop_unused(model.graph)
    return Report(tuple(quantized), declined)


def _formats(layer: Layer, states: Mapping[str, LayerState], recipe: Recipe) -> tuple[str, str]:
    """Formats of weights and activations; for ``fp4`` those that the calibration chose."""
    weights, activations = recipe.formats(layer.name)
    chosen = states[layer.name].formats
    return (chosen[0] if weights == "fp4" else weights), (chosen[1] if activations == "fp4" else activations)


def _check_opset(model: ir.Model, recipe: Recipe, placement: Placement) -> None:
    opset = model.opset_imports.get("", 0)
    if recipe.weights == "nvfp4" and not placement.simulates and opset < _float4.OPSET:
        raise ArgumentError(
            "The bundle's ONNX operator set has no four-bit floating point",
            got=f"opset {opset}",
            allowed=f"opset {_float4.OPSET} and newer",
            do=f"Export again with --opset {_float4.OPSET}.",
        )


def _declines(layer: Layer, states: Mapping[str, LayerState], recipe: Recipe, placement: Placement) -> str | None:
    if layer.node.op_type not in placement.inputs:
        return f"the placement '{placement.name}' does not quantize {layer.node.op_type}"
    if expression := recipe.excludes(layer.name):
        return f"the recipe keeps '{expression}' float"
    if layer.name not in states:
        return "the calibration did not reach it"
    if states[layer.name].is_constant:
        return "its input never changed in the calibration, and a range of no width has no scale"
    if recipe.formats(layer.name)[0] == "nvfp4":
        return _float4.nvfp4_declines(layer, simulated=placement.simulates)
    return dynamic_declines(layer) if recipe.dynamic else None


class _Writer:
    """Adds nodes and initializers to one graph; remembers which tensors are quantized already."""

    def __init__(self, graph: ir.Graph, placement: Placement, dynamic: str):
        self.graph, self.placement, self.add = graph, placement, Additions(graph)
        self.activations: dict[tuple[object, ...], ir.Value] = {}
        self.weights: dict[tuple[str, bool], ir.Value] = {}
        self.dynamic = DynamicProducts(self.add, dynamic)
        self.simulated: set[str] = set()  # number formats that the model needs functions for

    def quantize(self, layer: Layer, state: LayerState, weights: str, activations: str) -> None:
        node = layer.node
        if self.dynamic.way and node.op_type != "Conv":
            if state.bias is not None:
                self._set_bias(layer, state.bias)
            self.dynamic.replace(layer, self._input(layer, state, "float"), state, weights, activations)
            return
        node.replace_input_with(0, self._input(layer, state, activations))
        steps = None
        given = any(output is node.outputs[0] for output in self.graph.outputs)  # to the caller, who wants it as it is
        if activations == "int8" and node.op_type in self.placement.outputs and not given:
            steps = self._output(layer, state)
        elif state.bias is not None:
            self._set_bias(layer, state.bias)
        node.replace_input_with(1, self._weight(layer, state, weights, self._weight_kind(weights, activations), steps))

    def add_functions(self, model: ir.Model) -> None:
        """Give the model the functions that its new nodes call, and the names of their domains."""
        add_functions(model, self.simulated)
        if self.dynamic.way == "token":
            add_token_functions(model)
        if any(node.domain == _float4.TENSORRT for node in self.graph):
            model.opset_imports[_float4.TENSORRT] = 1

    def _input(self, layer: Layer, state: LayerState, kind: str) -> ir.Value:
        """The layer's input divided by the factors, quantized and read back."""
        source = layer.node.inputs[0]
        assert source is not None
        key = (source, kind, state.factors.tobytes(), *state.input_range())
        if key not in self.activations:
            value = self._divided(source, state.factors, layer) if (state.factors != 1).any() else source
            if self._is_simulated(kind):
                self.simulated.add(kind)
                value = _float4.simulated_input(self.add, value, layer, kind, _largest(state))
            elif kind == "nvfp4":
                value = _float4.nvfp4_input(self.add, value, layer, _largest(state))
            elif kind != "float":
                value = self._pair(value, layer, self._quantizer(state.input_range(), kind), kind)
            self.activations[key] = value
        return self.activations[key]

    def _is_simulated(self, kind: str) -> bool:
        return kind in FLOAT4 or (self.placement.simulates and kind in ("nvfp4", "fp8"))

    def _divided(self, value: ir.Value, factors: np.ndarray, layer: Layer) -> ir.Value:
        shape = (-1, 1, 1) if layer.axis == 1 else (-1,)
        inverse = (1 / factors.astype(np.float64)).reshape(shape).astype(layer.dtype.numpy())
        product = ir.node("Mul", [value, self.add.constant(f"{value.name}.balance", inverse)])
        return self.add.made(product, f"{value.name}.balanced", value, layer.dtype, before=layer.node)

    def _quantizer(self, bounds: tuple[float, float], kind: str) -> Affine:
        if kind == "fp8":
            return Affine(float(e4m3_scale(max(abs(bound) for bound in bounds))), 0, -E4M3_MAX, E4M3_MAX)
        return affine(*bounds, BITS[kind], signed=self._signed)

    def _pair(self, value: ir.Value, layer: Layer, quantizer: Affine, kind: str) -> ir.Value:
        """Q and DQ with one scale."""
        code = _FLOAT8 if kind == "fp8" else ir.DataType[("" if self._signed else "U") + kind.upper()]
        parameters = (np.array(quantizer.scale, np.float32), np.array(quantizer.zero))
        q = self._node("QuantizeLinear", value, parameters, code, layer, layer.axis)
        self.add.made(q, f"{value.name}.quantized", value, code, before=layer.node)
        dq = self._node("DequantizeLinear", q.outputs[0], parameters, code, layer, layer.axis)
        return self.add.made(dq, f"{value.name}.dequantized", value, layer.dtype, before=layer.node)

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
        self.add.made(q, f"{output.name}.quantized", output, code, after=node)
        dq = self._node("DequantizeLinear", q.outputs[0], outof, code, layer, layer.axis)
        read = self.add.made(dq, f"{output.name}.dequantized", output, layer.dtype, after=q)
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
        node, bias = layer.node, self.add.constant(f"{layer.name}.bias.learned", values.astype(layer.dtype.numpy()))
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
        total = self.add.made(added, f"{output.name}.biased", output, layer.dtype, after=layer.node)
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
        if weights == "nvfp4" and not self.placement.simulates:
            self.weights[key] = _float4.nvfp4_weight(self.add, layer, state)
        elif weights in (*FLOAT4, "nvfp4"):
            self.weights[key] = _float4.simulated_weight(self.add, layer, state, weights)
        else:
            self.weights[key] = self._affine_weight(layer, state, weights, stored, steps)
        return self.weights[key]

    def _affine_weight(self, layer: Layer, state: LayerState, weights: str, stored: str, steps: np.ndarray | None) -> ir.Value:
        scale = e4m3_scale(state.weight_amax) if weights == "fp8" else weight_scale(state.weight_amax, BITS[weights])
        kind = _FLOAT8 if stored == "fp8" else ir.DataType[stored.upper()]
        name, shape = f"{layer.name}.weight", shape_as_read(layer)
        q = self.add.later(
            f"{name}.codes" + (".transposed" if layer.transposed else ""),
            lambda: as_read(codes_of(layer, state, weights), layer).astype(kind.numpy()),
            kind,
            shape,
        )
        scale = as_read(scale, layer)
        read = np.ascontiguousarray(scale if steps is None else scale / steps).astype(np.float32)
        axis = output_axis(layer)
        if scale.ndim == 2:  # groups of inputs
            axis = 1 - axis
        dq = self._node("DequantizeLinear", q, (read, np.zeros(read.shape)), kind, layer, axis, name=name)
        if scale.ndim == 2:
            dq.attributes["block_size"] = ir.AttrInt64("block_size", shape[axis] // read.shape[axis])
        return self.add.made(dq, f"{name}.dequantized", q, layer.dtype, before=layer.node)

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
        scales = self.add.constant(f"{stem}.scale", scale.astype(layer.dtype.numpy()))
        zeros = self.add.constant(f"{stem}.zero_point", zero.astype(code.numpy()))
        return ir.node(kind, [value, scales, zeros], attributes={"axis": axis} if scale.ndim else {})


def _largest(state: LayerState) -> float:
    """Of the input's values, as they are quantized."""
    return max(abs(bound) for bound in state.input_range())


def _constant_of(value: ir.Value) -> np.ndarray:
    """An initializer seen through a Cast."""
    producer = value.producer()
    if producer is not None and producer.op_type == "Cast" and producer.inputs[0] is not None:
        value = producer.inputs[0]
    assert value.const_value is not None, value.name
    return value.const_value.numpy()


def _drop_unused(graph: ir.Graph) -> None:
    """Remove what only served the float weights: their casts, transposes and initializers."""
    kept = set(graph.outputs)
    for node in reversed(list(graph)):
        if not any(output.uses() or output in kept for output in node.outputs):
            graph.remove(node, safe=True)
    drop_unread(graph)
