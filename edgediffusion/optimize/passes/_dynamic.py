"""Matrix products whose input's range is found at run time, in integer kernels of ONNX Runtime.

``tensor``: one range for all of the input, in operators that ONNX Runtime fuses to one kernel.

    x ─ DynamicQuantizeLinear ─ MatMulInteger(w8) ─ Cast ─ Mul(s_x s_w) ─ y

``token`` (Q-DiT, Chen et al. 2024, 2406.17343, section 3.2; ViDiT-Q, 2406.02540): a range for each row, or for each group of its
channels, as low + step * code without a zero point to round. Groups are a batch of products, since a kernel sums over all channels of one:

    y = sum_G step_x step_w (codes_x codes_w) + low_x (step_w sum codes_w)

as functions of the model, ``edgediffusion.QuantizeTokens``, whose codes all layers that read one tensor share, and ``MultiplyTokens``;
for groups ``QuantizeGroups`` and ``MultiplyGroups``: without groups there is no batch to turn and to sum up. Weights are symmetric;
Q-DiT's have zero points too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from edgediffusion.optimize.graph_layers import Layer
from edgediffusion.optimize.integers import SMALLEST, weight_scale
from edgediffusion.optimize.passes._additions import Additions
from edgediffusion.optimize.passes._simulation import DOMAIN
from edgediffusion.optimize.passes._weights import codes_of
from edgediffusion.optimize.recipe import BITS
from edgediffusion.optimize.state import LayerState

_ROUNDED = f"""
  span = Sub (high, low)
  even = Div (span, levels)
  least = Constant <value = float {{{SMALLEST!r}}}> ()
  step = Max (even, least)
  above = Sub (groups, low)
  steps = Div (above, step)
  whole = Round (steps)
  codes = Cast <to = 2> (whole)
}}
"""
_FUNCTIONS = f"""
<domain: "{DOMAIN}", opset_import: ["": OPSET]>
QuantizeTokens (x, levels) => (codes, step, low)
{{
  groups = Cast <to = 1> (x)
  last = Constant <value_ints = [-1]> ()
  low = ReduceMin <keepdims = 1> (groups, last)
  high = ReduceMax <keepdims = 1> (groups, last)
  {_ROUNDED}
<domain: "{DOMAIN}", opset_import: ["": OPSET]>
MultiplyTokens (x, codes, step, low, w, w_step, w_sum) => (y)
{{
  integers = MatMulInteger (codes, w)
  f = Cast <to = 1> (integers)
  of_weights = Mul (f, w_step)
  products = Mul (of_weights, step)
  shift = Mul (low, w_sum)
  total = Add (products, shift)
  y = CastLike (total, x)
}}
<domain: "{DOMAIN}", opset_import: ["": OPSET]>
QuantizeGroups (x, levels, sizes) => (codes, step, low)
{{
  f = Cast <to = 1> (x)
  rows = Reshape (f, sizes)
  groups = Transpose <perm = [1, 0, 2]> (rows)
  last = Constant <value_ints = [2]> ()
  low = ReduceMin <keepdims = 1> (groups, last)
  high = ReduceMax <keepdims = 1> (groups, last)
  {_ROUNDED}
<domain: "{DOMAIN}", opset_import: ["": OPSET]>
MultiplyGroups (x, codes, step, low, w, w_step, w_sum) => (y)
{{
  integers = MatMulInteger (codes, w)
  f = Cast <to = 1> (integers)
  of_weights = Mul (f, w_step)
  of_both = Mul (of_weights, step)
  first = Constant <value_ints = [0]> ()
  products = ReduceSum <keepdims = 0> (of_both, first)
  last = Constant <value_ints = [2]> ()
  lows = Squeeze (low, last)
  by_row = Transpose <perm = [1, 0]> (lows)
  shift = MatMul (by_row, w_sum)
  total = Add (products, shift)
  before = Shape <end = -1> (x)
  outputs = Shape <start = 2> (w)
  shape = Concat <axis = 0> (before, outputs)
  shaped = Reshape (total, shape)
  y = CastLike (shaped, x)
}}
"""


@dataclass
class DynamicProducts:
    """Writes them into one graph; ``way`` is the recipe's ``dynamic``."""

    add: Additions
    way: str
    quantized: dict[tuple[object, ...], tuple[ir.Value, ...]] = field(default_factory=dict)  # by the tensor and the number of groups

    def replace(self, layer: Layer, source: ir.Value, state: LayerState, weights: str, activations: str) -> None:
        """Let integer products of ``source`` take the place of the layer's node; a Gemm's bias is added behind."""
        node, output, add = layer.node, layer.node.outputs[0], self.add
        make = self._tensor if self.way == "tensor" else self._token
        given = make(layer, source, state, weights, activations)
        if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
            total = ir.node("Add", [given, node.inputs[2]])
            given = add.made(total, f"{output.name}.biased", output, layer.dtype, before=node)
        given.type, given.shape = output.type, output.shape
        for use in list(output.uses()):
            use.node.replace_input_with(use.idx, given)
        given.name, output.name = output.name, add.unused(f"{output.name}.float")
        for at, value in enumerate(add.graph.outputs):
            if value is output:
                add.graph.outputs[at] = given
        add.graph.remove(node, safe=True)

    def _tensor(self, layer: Layer, source: ir.Value, state: LayerState, weights: str, activations: str) -> ir.Value:
        name, output, add = f"{layer.name}.weight", layer.node.outputs[0], self.add
        if (key := (source,)) not in self.quantized:
            wide = source
            if layer.dtype != ir.DataType.FLOAT:
                cast = ir.node("Cast", [source], {"to": int(ir.DataType.FLOAT)})
                wide = add.made(cast, f"{source.name}.wide", source, ir.DataType.FLOAT, before=layer.node)
            q = ir.node("DynamicQuantizeLinear", [wide], num_outputs=3)
            add.made(q, f"{source.name}.quantized", source, ir.DataType.UINT8, before=layer.node)
            for value, part in zip(q.outputs[1:], ("scale", "zero_point"), strict=True):
                value.name = add.unused(f"{source.name}.quantized.{part}")
            self.quantized[key] = tuple(q.outputs)
        codes, scale, zero = self.quantized[key]
        stored = add.later(f"{name}.codes", lambda: codes_of(layer, state, weights).T, ir.DataType.INT8, layer.channels)
        steps = add.constant(f"{name}.scale", weight_scale(state.weight_amax, BITS[weights]))
        product = ir.node("MatMulInteger", [codes, stored, zero, add.constant(f"{name}.zero_point", np.zeros((), np.int8))])
        integers = add.made(product, f"{output.name}.integers", output, ir.DataType.INT32, before=layer.node)
        cast = ir.node("Cast", [integers], {"to": int(ir.DataType.FLOAT)})
        wide = add.made(cast, f"{output.name}.steps", output, ir.DataType.FLOAT, before=layer.node)
        both = ir.node("Mul", [scale, steps])
        step = add.made(both, f"{output.name}.step", steps, ir.DataType.FLOAT, before=layer.node)
        whole = add.made(ir.node("Mul", [wide, step]), f"{output.name}.read", output, ir.DataType.FLOAT, before=layer.node)
        if layer.dtype == ir.DataType.FLOAT:
            return whole
        narrow = ir.node("Cast", [whole], {"to": int(layer.dtype)})
        return add.made(narrow, f"{output.name}.narrow", output, layer.dtype, before=layer.node)

    def _token(self, layer: Layer, source: ir.Value, state: LayerState, weights: str, activations: str) -> ir.Value:
        name, add, (read, out) = f"{layer.name}.weight", self.add, layer.channels
        amax = state.weight_amax.reshape(out, -1)
        groups = amax.shape[1]
        shape = (groups, read // groups, out) if groups > 1 else (read, out)
        steps = np.ascontiguousarray(weight_scale(amax, BITS[weights]).T)  # [groups, out]

        def codes() -> np.ndarray:
            return np.ascontiguousarray(codes_of(layer, state, weights).T).reshape(shape)

        def sums() -> np.ndarray:
            return np.asarray((codes().reshape(groups, -1, out).sum(1) * steps).reshape(summed), np.float32)

        summed = (groups, out) if groups > 1 else (out,)
        quantized = self._tokens(layer, source, groups, 2 ** BITS[activations] - 1)
        parts = (
            add.later(f"{name}.codes", codes, ir.DataType.INT8, shape),
            add.constant(f"{name}.scale", steps[:, None] if groups > 1 else steps[0]),
            add.later(f"{name}.sums", sums, ir.DataType.FLOAT, summed),
        )
        product = ir.node("MultiplyGroups" if groups > 1 else "MultiplyTokens", [source, *quantized, *parts], domain=DOMAIN)
        return add.made(product, f"{layer.node.outputs[0].name}.read", layer.node.outputs[0], layer.dtype, before=layer.node)

    def _tokens(self, layer: Layer, source: ir.Value, groups: int, levels: int) -> tuple[ir.Value, ...]:
        """Codes, steps and lowest values of the tokens of ``source``."""
        if (key := (source, groups, levels)) not in self.quantized:
            given = [source, self.add.constant(f"{source.name}.levels", np.array(levels, np.float32))]
            if groups > 1:
                sizes = np.array([-1, groups, layer.channels[0] // groups], np.int64)
                given.append(self.add.constant(f"{source.name}.sizes", sizes))
            q = ir.node("QuantizeGroups" if groups > 1 else "QuantizeTokens", given, domain=DOMAIN, num_outputs=3)
            for value, part in zip(q.outputs, ("quantized", "step", "low"), strict=True):
                value.name = self.add.unused(f"{source.name}.{part}")
            self.add.graph.insert_before(layer.node, [q])
            self.quantized[key] = tuple(q.outputs)
        return self.quantized[key]


def dynamic_declines(layer: Layer) -> str | None:
    """Why a matrix product cannot be one of integers alone."""
    attributes = layer.node.attributes
    scaled = attributes.get_float("alpha", 1.0) != 1 or attributes.get_float("beta", 1.0) != 1 or attributes.get_int("transA", 0) != 0
    return "its Gemm scales or turns what it reads" if layer.node.op_type == "Gemm" and scaled else None


def add_token_functions(model: ir.Model) -> None:
    """Give ``model`` the functions that its products with ranges for each token call."""
    opset = model.opset_imports[""]
    text = f'<ir_version: 10, opset_import: ["": {opset}]> none (float x) => (float y) {{ y = Identity (x) }}'
    called = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for key, function in ir.from_onnx_text(text + _FUNCTIONS.replace("OPSET", str(opset))).functions.items():
        if function.name in called:
            model.functions[key] = function
    model.opset_imports[DOMAIN] = 1
