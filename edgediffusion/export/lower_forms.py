"""Operators that took what they take in another form before.

    ReduceMean, ReduceMax, ...             axes are an attribute before opset 18
    Split                                  has no number of outputs before opset 18: it splits evenly
    Pad                                    has no axes before opset 18: it pads all
    QuantizeLinear, DequantizeLinear       scales and what they belong to are float32 before opset 19; no blocks, no 4 and no 16 bits
                                           before opset 21; no fp8 before opset 19

Before opset 19 a float16 graph has a Cast in front of each QuantizeLinear and behind each DequantizeLinear. A code times a float16 scale
fits into float32, so that what is read is the same number; what is divided may be rounded to another code where it lies half way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from edgediffusion.export.lower_writer import Refused, Rule, Writer, constant_of, rank_of, size_of

_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")  # ReduceSum has its axes as an input since 13
_CODES = {
    13: (ir.DataType.INT8, ir.DataType.UINT8),
    19: (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E4M3FNUZ, ir.DataType.FLOAT8E5M2, ir.DataType.FLOAT8E5M2FNUZ),
    21: (ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT16, ir.DataType.UINT16),
    23: (ir.DataType.FLOAT4E2M1,),
}


def reduction(node: ir.Node, write: Writer) -> bool:
    if write.opset >= 18:  # of opset 20, for truth values
        if node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.BOOL:
            raise Refused(f"{node.op_type} of truth values is of opset 20")
        return False
    attributes: dict[str, Any] = {"keepdims": node.attributes.get_int("keepdims", 1)}
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    if axes is not None:
        found = constant_of(axes)
        if found is None:
            raise Refused(f"{node.op_type} over axes that are computed")
        attributes["axes"] = [int(axis) for axis in found]
    if not attributes.get("axes"):
        attributes.pop("axes", None)
        if node.attributes.get_int("noop_with_empty_axes", 0):
            write.finish(write.add("Identity", node.inputs[0]))
            return True
    write.finish(write.add(node.op_type, node.inputs[0], **attributes))
    return True


def split(node: ir.Node, write: Writer) -> bool:
    """Even parts need no sizes; where the last one is smaller, or nothing is known, sizes are written down."""
    parts = node.attributes.get_int("num_outputs", 0)
    node.attributes.pop("num_outputs", None)
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        return False
    size = size_of(node.inputs[0], node.attributes.get_int("axis", 0))
    if size is None:
        raise Refused("Split of an axis of unknown size into parts")
    each = math.ceil(size / parts)
    if each * parts != size:
        node.resize_inputs(2)
        node.replace_input_with(1, write.constant([each] * (parts - 1) + [size - each * (parts - 1)]))
    return True


def pad(node: ir.Node, write: Writer) -> bool:
    if node.attributes.get_string("mode", "constant") == "wrap" and write.opset < 19:
        raise Refused("Pad with mode 'wrap' is of opset 19")
    if len(node.inputs) < 4 or node.inputs[3] is None or write.opset >= 18:
        return False
    axes, sizes, rank = constant_of(node.inputs[3]), constant_of(node.inputs[1]), rank_of(node.inputs[0])
    if axes is None or sizes is None or rank is None:
        raise Refused("Pad of axes that are computed")
    every = np.zeros((2, rank), np.int64)
    every[:, [int(axis) % rank for axis in axes]] = sizes.reshape(2, -1)
    node.replace_input_with(1, write.constant(every.reshape(-1)))
    node.resize_inputs(3)
    return True


def quantize(node: ir.Node, write: Writer) -> bool:
    _refuse_formats(node, write.opset)
    if write.opset < 21 and len(node.inputs) < 3 and (code := node.attributes.get_int("output_dtype", 0)):
        node.resize_inputs(3)
        scale = node.inputs[1]
        shape = () if scale is None or scale.shape is None else tuple(scale.shape.numpy())
        node.replace_input_with(2, write.constant(np.zeros(shape), ir.DataType(code)))
    _drop(node, write.opset)
    if write.opset >= 19 or write.dtype == ir.DataType.FLOAT:
        return False
    source, scale, *zero = node.inputs
    attributes: dict[str, Any] = {"axis": node.attributes.get_int("axis", 1)}
    given = _wide(write, source), _wide(write, scale), *zero
    write.finish(write.add("QuantizeLinear", *given, dtype=node.outputs[0].dtype, **attributes))
    return True


def dequantize(node: ir.Node, write: Writer) -> bool:
    _refuse_formats(node, write.opset)
    _drop(node, write.opset)
    scale = node.inputs[1]
    if scale is None or scale.dtype is None:
        raise Refused("DequantizeLinear with a scale of an unknown type")
    if write.opset >= 19 or scale.dtype == ir.DataType.FLOAT:
        return False
    attributes: dict[str, Any] = {"axis": node.attributes.get_int("axis", 1)}
    read = write.add("DequantizeLinear", node.inputs[0], _wide(write, scale), *node.inputs[2:], dtype=ir.DataType.FLOAT, **attributes)
    write.finish(write.add("Cast", read, to=int(scale.dtype), dtype=scale.dtype))
    return True


def _refuse_formats(node: ir.Node, opset: int) -> None:
    """What a Q or DQ of the older set cannot have: other codes, scales for blocks, sums in another precision."""
    codes = {v.dtype for v in (*node.inputs[2:], *(node.outputs if node.op_type == "QuantizeLinear" else node.inputs[:1])) if v is not None}
    if node.op_type == "QuantizeLinear":
        codes.add(ir.DataType(node.attributes.get_int("output_dtype", 0)))
    for first, known in _CODES.items():
        if first > opset and (newer := codes & set(known)):
            raise Refused(f"{node.op_type} of {', '.join(sorted(code.name.lower() for code in newer if code))} is of opset {first}")
    if node.attributes.get_int("block_size", 0) and opset < 21:
        raise Refused(f"{node.op_type} with a scale for each block is of opset 21")
    if node.attributes.get_int("precision", 0):
        raise Refused(f"{node.op_type} with a precision of its own is of opset 23")
    if node.op_type == "DequantizeLinear" and node.attributes.get_int("output_dtype", 0) != 0:
        raise Refused("DequantizeLinear to another type than its scale's is of opset 23")


def _drop(node: ir.Node, opset: int) -> None:
    """Attributes that say what the older operator does anyway."""
    for name, first in (("block_size", 21), ("output_dtype", 21), ("precision", 23), ("saturate", 19)):
        if first > opset:
            node.attributes.pop(name, None)


def _wide(write: Writer, value: ir.Value | None) -> ir.Value:
    """The value in float32; a constant is written anew, for engines look for constant scales."""
    assert value is not None
    known = constant_of(value)
    if known is not None:
        return write.constant(known.astype(np.float32))
    return write.add("Cast", value, to=int(ir.DataType.FLOAT), dtype=ir.DataType.FLOAT)


RULES: Mapping[str, Rule] = {
    **{f"Reduce{what}": reduction for what in _REDUCTIONS},
    "DequantizeLinear": dequantize,
    "Pad": pad,
    "QuantizeLinear": quantize,
    "Split": split,
}
