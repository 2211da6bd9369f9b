"""The layers of an ONNX graph: its convolutions and matrix products with a weight, by the names of the weights.

A layer is a Conv, MatMul or Gemm whose second input is an initializer, seen through (1) a Cast, because a float32 graph may keep
its weights in float16, and (2) a Transpose, because torch stores a linear layer as [out, in]. Its name is that of the weight without
``.weight``: the module's path, where the graph kept the names of a checkpoint. Other exporters fold the Transpose into the weight and
give it a name such as ``onnx::MatMul_123``; the layer then goes by that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

LAYER_OPS = ("Conv", "MatMul", "Gemm")
ROTATION = ".rotation"  # ends the names of matrices that turn a layer's input (passes/rotate.py): products with them are no layers
_RANKS = {"Conv": 4, "MatMul": 2, "Gemm": 2}


@dataclass(frozen=True)
class Layer:
    """``transposed``: the node reads the weight as [in, out]; ``turned``: the initializer is [in, out] too, not [out, in]."""

    name: str
    node: ir.Node
    weight: ir.Value
    transposed: bool
    turned: bool
    dtype: ir.DataType  # that the node computes in

    @property
    def axis(self) -> int:
        """The axis of the channels in what the layer reads and gives."""
        return 1 if self.node.op_type == "Conv" else -1

    @property
    def groups(self) -> int:
        return self.node.attributes.get_int("group", 1) if self.node.op_type == "Conv" else 1

    @property
    def channels(self) -> tuple[int, int]:
        """How many the layer reads and gives."""
        assert self.weight.const_value is not None
        first, second = self.weight.const_value.shape.numpy()[:2]
        out, read = (second, first) if self.turned else (first, second)
        return read * self.groups, out

    @property
    def given(self) -> ir.Value:
        """What the layer gives, with its bias: a matrix product may have it in an Add behind it."""
        output = self.node.outputs[0]
        uses = list(output.uses())
        if self.node.op_type == "Conv" or len(uses) != 1 or uses[0].node.op_type != "Add":
            return output
        other = uses[0].node.inputs[1 - uses[0].idx]
        is_bias = other is not None and is_constant(other) and other.shape == self.channels[1:]
        return uses[0].node.outputs[0] if is_bias else output

    def read_weight(self) -> np.ndarray:
        """float32 [out, in, ...], read anew each time: a network's weights need not fit into memory together."""
        assert self.weight.const_value is not None
        weight = self.weight.const_value.numpy().astype(np.float32)
        if isinstance(self.weight.const_value, ir.ExternalTensor):
            self.weight.const_value.release()  # or the file's pages stay in memory
        return np.ascontiguousarray(weight.T) if self.turned else weight


def find_layers(graph: ir.Graph) -> list[Layer]:
    """The layers in the order of the graph."""
    found = []
    for node in graph:
        if node.op_type not in LAYER_OPS or node.domain not in ("", "ai.onnx"):
            continue
        value, turns, dtype = node.inputs[1], 0, None
        while value is not None and not value.is_initializer():
            producer = value.producer()
            if producer is None or producer.op_type not in ("Cast", "Transpose"):
                break
            turns += producer.op_type == "Transpose"
            if producer.op_type == "Cast" and dtype is None:
                dtype = ir.DataType(producer.attributes["to"].as_int())
            value = producer.inputs[0]
        if value is None or not value.is_initializer() or value.name is None or value.const_value is None:
            continue
        if len(value.const_value.shape) != _RANKS[node.op_type] or value.name.endswith(ROTATION):
            continue
        transposed = node.op_type == "MatMul" or (node.op_type == "Gemm" and not node.attributes.get_int("transB", 0))
        turned = transposed != bool(turns % 2)
        found.append(Layer(value.name.removesuffix(".weight"), node, value, transposed, turned, dtype or value.const_value.dtype))
    return found


def is_constant(value: ir.Value) -> bool:
    """Whether it is an initializer, seen through a Cast."""
    producer = value.producer()
    source = producer.inputs[0] if producer is not None and producer.op_type == "Cast" else value
    return source is not None and source.is_initializer()
