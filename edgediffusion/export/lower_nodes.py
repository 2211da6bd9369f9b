"""Operators that an older set lacks, written with operators that it has.

    Attention            scores = q K^T, + mask, Softmax, times V                     of opset 23
    RMSNormalization     x / sqrt(mean(x^2) + epsilon) * scale                        of opset 23
    GroupNormalization   an instance normalization over groups: group_norm.py         of opset 21, with a scale for each channel
    Gelu                 x (1 + erf(x / sqrt 2)) / 2, or its approximation by tanh    of opset 20
    Mish                 x tanh(softplus(x))                                          of opset 18

What each computes, and in which order, is what the operator's own function says (onnx.ai/onnx/operators), so that numbers are equal to
rounding. Where q or K comes from a DequantizeLinear the scale goes behind their product: in front of it, it would keep an engine from
multiplying integers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from edgediffusion.export.lower_writer import Refused, Rule, Writer, rank_of, refuse_outputs, size_of

_LARGEST_CONSTANT = 1 << 14  # entries of a causal mask that is written down
_UNSUPPORTED = ("past_key", "past_value", "nonpad_kv_seqlen")  # inputs of Attention behind the mask: caches of language models


def attention(node: ir.Node, write: Writer) -> bool:
    """Cases: queries, keys and values [batch, heads, tokens, channels], or [batch, tokens, heads * channels]; fewer heads of keys than
    of queries, which are then repeated; a mask that is added or, of truth values, chosen by; a causal one."""
    refuse_outputs(node, 1, ("present_key", "present_value", "qk_matmul_output"))
    for name, value in zip(_UNSUPPORTED, node.inputs[4:], strict=False):
        if value is not None:
            raise Refused(f"Attention with {name}")
    if node.attributes.get_float("softcap", 0.0):
        raise Refused("Attention with softcap")
    query, key, value = node.inputs[:3]
    assert query is not None
    assert key is not None
    heads, fewer = _heads(node)
    flat = rank_of(query) == 3
    dtype, channels = write.dtype, _channels(query, heads, flat=flat)
    integers = any(_is_dequantized(v) for v in (query, key))
    if flat:
        query, key, value = (_apart(write, v, of) for v, of in ((query, heads), (key, fewer), (value, fewer)))
    key, value = (_repeated(write, v, heads, fewer) for v in (key, value))
    scale = node.attributes.get_float("scale", 0.0) or 1 / math.sqrt(channels)
    turned = write.add("Transpose", key, perm=[0, 1, 3, 2])
    if not integers:
        root = write.constant(math.sqrt(scale), dtype)
        query, turned = write.add("Mul", query, root), write.add("Mul", turned, root)
    scores = write.add("MatMul", query, turned)
    if integers:
        scores = write.add("Mul", scores, write.constant(scale, dtype))
    scores = _masked(node, write, scores, query, key, dtype)
    read = write.add("MatMul", _softmax(node, write, scores, dtype), value)
    if flat:
        read = write.add("Transpose", read, perm=[0, 2, 1, 3])
        read = write.add("Reshape", read, write.constant([0, 0, -1]))
    write.finish(read)
    return True


def _heads(node: ir.Node) -> tuple[int, int]:
    """Of queries and of keys; 0 where it does not say and need not."""
    query, key = node.inputs[:2]
    if rank_of(query) == 3:
        return node.attributes["q_num_heads"].as_int(), node.attributes["kv_num_heads"].as_int()
    if rank_of(query) != 4:
        raise Refused("Attention of queries of an unknown shape")
    return size_of(query, 1) or 0, size_of(key, 1) or 0


def _channels(query: ir.Value | None, heads: int, *, flat: bool) -> int:
    width = size_of(query, -1)
    if width is None:
        raise Refused("Attention of heads of an unknown width")
    return width // heads if flat else width


def _is_dequantized(value: ir.Value | None) -> bool:
    """Whether a DequantizeLinear gives it, perhaps through nodes that only move numbers."""
    producer = None if value is None else value.producer()
    while producer is not None and producer.op_type in ("Transpose", "Reshape", "Unsqueeze", "Squeeze"):
        source = producer.inputs[0]
        producer = None if source is None else source.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def _apart(write: Writer, value: ir.Value | None, heads: int) -> ir.Value:
    """[batch, tokens, heads * channels] -> [batch, heads, tokens, channels]"""
    split = write.add("Reshape", value, write.constant([0, 0, heads, -1]))
    return write.add("Transpose", split, perm=[0, 2, 1, 3])


def _repeated(write: Writer, value: ir.Value | None, heads: int, fewer: int) -> ir.Value:
    """[batch, fewer, tokens, channels] -> [batch, heads, tokens, channels], each one as often as there are queries for it."""
    assert value is not None
    if heads == fewer:
        return value
    if not fewer or heads % fewer:
        raise Refused(f"Attention with {heads} heads for {fewer}")
    apart = write.add("Unsqueeze", value, write.constant([2]))
    more = write.add("Expand", apart, write.constant([1, 1, heads // fewer, 1, 1]))
    return write.add("Reshape", more, write.add("Concat", *_grown(write, value, heads), axis=0, dtype=ir.DataType.INT64))


def _grown(write: Writer, value: ir.Value, heads: int) -> tuple[ir.Value, ...]:
    """The shape of ``value`` with this many heads, in parts."""
    batch, rest = (write.add("Shape", value, dtype=ir.DataType.INT64, **at) for at in ({"start": 0, "end": 1}, {"start": 2, "end": 4}))
    return batch, write.constant([heads]), rest


def _masked(node: ir.Node, write: Writer, scores: ir.Value, query: ir.Value, key: ir.Value, dtype: ir.DataType) -> ir.Value:
    """What is not to be looked at gets the lowest number there is, as in ONNX Runtime: -inf makes NaN of a row that may see nothing."""
    lowest = float(np.finfo(dtype.numpy()).min) if dtype != ir.DataType.BFLOAT16 else -3.3895313892515355e38
    if node.attributes.get_int("is_causal", 0):
        scores = write.add("Add", scores, _causal(write, query, key, lowest, dtype))
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if mask is None:
        return scores
    if mask.dtype is None:
        raise Refused("Attention with a mask of an unknown type")
    if mask.dtype == ir.DataType.BOOL:
        mask = write.add("Where", mask, write.constant(0.0, dtype), write.constant(lowest, dtype), dtype=dtype)
    return write.add("Add", scores, mask)


def _causal(write: Writer, query: ir.Value, key: ir.Value, lowest: float, dtype: ir.DataType) -> ir.Value:
    """[queries, keys]: 0 where a token may look, the lowest number at those behind it."""
    tokens = [size_of(value, 2) for value in (query, key)]
    if None not in tokens and math.prod(t or 0 for t in tokens) <= _LARGEST_CONSTANT:
        return write.constant(np.triu(np.full([t or 0 for t in tokens], lowest), 1), dtype)
    sizes = [write.add("Shape", value, start=2, end=3, dtype=ir.DataType.INT64) for value in (query, key)]
    full = write.add(
        "ConstantOfShape",
        write.add("Concat", *sizes, axis=0),
        value=ir.tensor(np.full(1, lowest, dtype.numpy()), dtype=dtype),
        dtype=dtype,
    )
    return write.add("Trilu", full, write.constant(1), upper=1)


def _softmax(node: ir.Node, write: Writer, scores: ir.Value, dtype: ir.DataType) -> ir.Value:
    precision = ir.DataType(node.attributes.get_int("softmax_precision", 0))
    if precision in (ir.DataType.UNDEFINED, dtype):
        return write.add("Softmax", scores, axis=-1)
    wide = write.add("Cast", scores, to=int(precision), dtype=precision)
    return write.add("Cast", write.add("Softmax", wide, axis=-1), to=int(dtype), dtype=dtype)


def rms_normalization(node: ir.Node, write: Writer) -> bool:
    source, scale = node.inputs
    dtype, wide = write.dtype, ir.DataType(node.attributes.get_int("stash_type", int(ir.DataType.FLOAT)))
    axis, rank = node.attributes.get_int("axis", -1), rank_of(source)
    if axis != -1 and rank is None:
        raise Refused("RMSNormalization of a tensor of unknown rank")
    axes = [-1] if axis == -1 else list(range(axis % (rank or 1), rank or 1))
    x = source if dtype == wide else write.add("Cast", source, to=int(wide), dtype=wide)
    mean = reduce(write, "ReduceMean", write.add("Mul", x, x), axes)
    epsilon = write.constant(node.attributes.get_float("epsilon", 1e-5), wide)
    normal = write.add("Div", x, write.add("Sqrt", write.add("Add", mean, epsilon)))
    if dtype != wide:
        normal = write.add("Cast", normal, to=int(dtype), dtype=dtype)
    write.finish(write.add("Mul", normal, scale))
    return True


def reduce(write: Writer, operator: str, value: ir.Value, axes: list[int]) -> ir.Value:
    """A reduction that keeps its axes; they are an input from opset 18 on."""
    if write.opset < 18:
        return write.add(operator, value, axes=axes, keepdims=1)
    return write.add(operator, value, write.constant(axes), keepdims=1)


def gelu(node: ir.Node, write: Writer) -> bool:
    x, dtype = node.inputs[0], write.dtype

    def number(value: float) -> ir.Value:
        return write.constant(value, dtype)

    if node.attributes.get_string("approximate", "none") == "tanh":
        cubed = write.add("Mul", write.add("Mul", x, x), x)
        inner = write.add("Add", x, write.add("Mul", cubed, number(0.044715)))
        bent = write.add("Tanh", write.add("Mul", inner, number(math.sqrt(2 / math.pi))))
    else:
        bent = write.add("Erf", write.add("Div", x, number(math.sqrt(2))))
    write.finish(write.add("Mul", write.add("Mul", x, write.add("Add", bent, number(1))), number(0.5)))
    return True


def group_normalization(node: ir.Node, write: Writer) -> bool:
    """Those of the graph itself are no more when this is asked (``lower_graph``)."""
    raise Refused(
        "GroupNormalization of a function" if write.since >= 21 else "GroupNormalization of opset 18, with a scale for each group"
    )


def mish(node: ir.Node, write: Writer) -> bool:
    x = node.inputs[0]
    write.finish(write.add("Mul", x, write.add("Tanh", write.add("Softplus", x))))
    return True


RULES: Mapping[str, Rule] = {
    "Attention": attention,
    "Gelu": gelu,
    "GroupNormalization": group_normalization,
    "Mish": mish,
    "RMSNormalization": rms_normalization,
}
