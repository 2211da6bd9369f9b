"""Rules of operators that keep the shape of what they read, or broadcast it; and of those that turn numbers into codes and back."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgediffusion.runtimes.onnx_header import TYPES
from edgediffusion.runtimes.onnx_nodes import Node
from edgediffusion.runtimes.shapes.value import Rule, Value, Values, at

_COMPARE = ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Xor")
_BROADCAST = ("Add", "Sub", "Mul", "Div", "Pow", "Mod", "Max", "Min", "Sum", "Mean", "PRelu", "Where", *_COMPARE)
_NORMS = ("BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "LpNormalization", "RMSNormalization")
_ACTIVATIONS = ("Celu", "Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "Hardmax", "LeakyRelu", "LogSoftmax", "Mish", "Relu", "Selu")
_SMOOTH = ("Sigmoid", "Softmax", "Softplus", "Softsign", "Swish", "Tanh", "ThresholdedRelu")
_FUNCTIONS = ("Acos", "Asin", "Atan", "Cos", "Cosh", "Erf", "Exp", "Log", "Sin", "Sinh", "Sqrt", "Tan")
_ENTRIES = (
    "Abs",
    "Ceil",
    "CumSum",
    "Dropout",
    "Floor",
    "Identity",
    "Neg",
    "Not",
    "Reciprocal",
    "RotaryEmbedding",
    "Round",
    "Sign",
    "Trilu",
)


def _same(node: Node, given: Values) -> list[Value]:
    first = at(given, 0)
    return [Value(first.dtype, first.shape) for _ in node.outputs[:1]]


def _cast(node: Node, given: Values) -> list[Value]:
    return [Value(TYPES[node.integer("to", 1)], at(given, 0).shape)]


def _cast_like(node: Node, given: Values) -> list[Value]:
    return [Value(at(given, 1).dtype, at(given, 0).shape)]


def _broadcast(node: Node, given: Values) -> list[Value]:
    values = [value for value in given if value is not None]
    dtype = "bool" if node.operator in _COMPARE else values[-1].dtype
    return [Value(dtype, np.broadcast_shapes(*(value.shape for value in values)))]


def _quantize(node: Node, given: Values) -> list[Value]:
    kind = node.integer("output_dtype", 0)
    zero = given[2] if len(given) > 2 else None
    return [Value(TYPES[kind] if kind else zero.dtype if zero else "uint8", at(given, 0).shape)]


def _dequantize(node: Node, given: Values) -> list[Value]:
    return [Value(at(given, 1).dtype, at(given, 0).shape)]


def _dynamic_quantize(node: Node, given: Values) -> list[Value]:
    return [Value("uint8", at(given, 0).shape), Value("float32", ()), Value("uint8", ())]


def _fp4_quantize(node: Node, given: Values) -> list[Value]:
    source, axis = at(given, 0), node.integer("axis", -1)
    blocks = list(source.shape)
    blocks[axis] = -(-blocks[axis] // node.integer("block_size", 16))
    return [Value("fp4", source.shape), Value("fp8", tuple(blocks))]


SAME: Mapping[str, Rule] = {
    **dict.fromkeys((*_NORMS, *_ACTIVATIONS, *_SMOOTH, *_FUNCTIONS, *_ENTRIES), _same),
    **dict.fromkeys(_BROADCAST, _broadcast),
    "Cast": _cast,
    "CastLike": _cast_like,
    "DequantizeLinear": _dequantize,
    "DynamicQuantizeLinear": _dynamic_quantize,
    "QuantizeLinear": _quantize,
    "TRT_FP4DynamicQuantize": _fp4_quantize,
}
