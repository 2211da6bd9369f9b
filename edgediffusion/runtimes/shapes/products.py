"""Rules of products, and of what sums over axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgediffusion.runtimes.onnx_nodes import Node
from edgediffusion.runtimes.shapes.value import Rule, Value, Values, at, axes_of


def _matmul(node: Node, given: Values) -> list[Value]:
    a, b = at(given, 0), at(given, 1)
    left = a.shape if len(a.shape) > 1 else (1, *a.shape)
    right = b.shape if len(b.shape) > 1 else (*b.shape, 1)
    if left[-1] != right[-2]:
        raise ValueError(f"{a.shape} times {b.shape}")
    rows, columns = left[-2:-1] if len(a.shape) > 1 else (), right[-1:] if len(b.shape) > 1 else ()
    dtype = "int32" if node.operator == "MatMulInteger" else a.dtype
    return [Value(dtype, (*np.broadcast_shapes(left[:-2], right[:-2]), *rows, *columns))]


def _gemm(node: Node, given: Values) -> list[Value]:
    a, b = at(given, 0), at(given, 1)
    return [Value(a.dtype, (a.shape[1 if node.integer("transA", 0) else 0], b.shape[0 if node.integer("transB", 0) else 1]))]


def _window(node: Node, given: Values, kernel: Sequence[int], channels: int) -> list[Value]:
    source, axes = at(given, 0), len(kernel)
    strides, dilations = node.integers("strides") or (1,) * axes, node.integers("dilations") or (1,) * axes
    pads = node.integers("pads") or (0,) * (2 * axes)
    same = node.word("auto_pad").startswith("SAME")
    out = []
    for i, size in enumerate(source.shape[2:]):
        spare = size + pads[i] + pads[i + axes] - dilations[i] * (kernel[i] - 1) - 1
        spare += strides[i] - 1 if node.integer("ceil_mode", 0) else 0
        out.append(-(-size // strides[i]) if same else spare // strides[i] + 1)
    return [Value("int32" if node.operator == "ConvInteger" else source.dtype, (source.shape[0], channels, *out))]


def _conv(node: Node, given: Values) -> list[Value]:
    weight = at(given, 1)
    return _window(node, given, weight.shape[2:], weight.shape[0])


def _pool(node: Node, given: Values) -> list[Value]:
    return _window(node, given, node.integers("kernel_shape") or (), at(given, 0).shape[1])[: len(node.outputs)]


def _conv_transpose(node: Node, given: Values) -> list[Value]:
    source, weight = at(given, 0), at(given, 1)
    axes = len(weight.shape) - 2
    strides, dilations = node.integers("strides") or (1,) * axes, node.integers("dilations") or (1,) * axes
    pads, extra = node.integers("pads") or (0,) * (2 * axes), node.integers("output_padding") or (0,) * axes
    out = [
        strides[i] * (size - 1) + extra[i] + (weight.shape[2 + i] - 1) * dilations[i] + 1 - pads[i] - pads[i + axes]
        for i, size in enumerate(source.shape[2:])
    ]
    return [Value(source.dtype, (source.shape[0], weight.shape[1] * node.integer("group", 1), *out))]


def _global_pool(node: Node, given: Values) -> list[Value]:
    source = at(given, 0)
    return [Value(source.dtype, source.shape[:2] + (1,) * (len(source.shape) - 2))]


def attention_sizes(node: Node, given: Values) -> tuple[int, int, int, int, int, int]:
    """Rows, heads, queries, keys, and the widths of a key and of a value.

    Queries are [rows, heads, queries, width], or [rows, queries, heads * width]; keys and values likewise.
    """
    q, k, v = (at(given, i).shape for i in range(3))
    if len(q) == 4:
        return q[0], q[1], q[2], k[2], q[3], v[3]
    heads, shared = node.integer("q_num_heads", 1), node.integer("kv_num_heads", 1)
    return q[0], heads, q[1], k[1], q[2] // heads, v[2] // shared


def _attention(node: Node, given: Values) -> list[Value]:
    rows, heads, queries, keys, _, width = attention_sizes(node, given)
    dtype = at(given, 0).dtype
    whole = (rows, heads, queries, width) if len(at(given, 0).shape) == 4 else (rows, queries, heads * width)
    rest = [Value(v.dtype, v.shape) for v in (at(given, 1), at(given, 2))] + [Value(dtype, (rows, heads, queries, keys))]
    return [Value(dtype, whole), *rest][: len(node.outputs)]


def _reduce(node: Node, given: Values) -> list[Value]:
    source, axes = at(given, 0), axes_of(node, given, 1)
    if node.operator in ("ArgMax", "ArgMin"):
        axes = [node.integer("axis", 0)]
    if not axes and node.integer("noop_with_empty_axes", 0):
        return [Value(source.dtype, source.shape)]
    gone = {axis % len(source.shape) for axis in axes or range(len(source.shape))}
    kept = [1 if i in gone else size for i, size in enumerate(source.shape)]
    shape = kept if node.integer("keepdims", 1) else [size for i, size in enumerate(kept) if i not in gone]
    return [Value("int64" if node.operator in ("ArgMax", "ArgMin") else source.dtype, tuple(shape))]


def einsum_sizes(node: Node, given: Values) -> tuple[dict[str, int], str]:
    """The size of each letter, and the letters of the result."""
    terms, _, result = node.word("equation").replace(" ", "").partition("->")
    if "." in terms or not result:
        raise ValueError("its equation has no result, or dots")
    sizes: dict[str, int] = {}
    for i, term in enumerate(terms.split(",")):
        sizes |= dict(zip(term, at(given, i).shape, strict=True))
    return sizes, result


def _einsum(node: Node, given: Values) -> list[Value]:
    sizes, result = einsum_sizes(node, given)
    return [Value(at(given, 0).dtype, tuple(sizes[letter] for letter in result))]


_REDUCED = ("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSumExp", "LogSum")

SUMS: Mapping[str, Rule] = {
    **dict.fromkeys((*(f"Reduce{name}" for name in _REDUCED), "ArgMax", "ArgMin"), _reduce),
    **dict.fromkeys(("MatMul", "MatMulInteger"), _matmul),
    **dict.fromkeys(("Conv", "ConvInteger"), _conv),
    **dict.fromkeys(("MaxPool", "AveragePool"), _pool),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool"), _global_pool),
    "Attention": _attention,
    "ConvTranspose": _conv_transpose,
    "Einsum": _einsum,
    "Gemm": _gemm,
}
