"""Operations of the nodes that are sums of products: nearly all of what a network calculates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from edgediffusion.runtimes.onnx_nodes import Node
from edgediffusion.runtimes.shapes import Value, attention_sizes, einsum_sizes


def _of_window(node: Node, given: list[Value | None], out: int) -> int:
    weight = given[1]
    assert weight is not None
    return out * math.prod(weight.shape[1:])  # [out, in / groups, *kernel]


def _of_transposed(node: Node, given: list[Value | None], out: int) -> int:
    source, weight = given[0], given[1]
    assert source is not None
    assert weight is not None
    return source.entries * math.prod(weight.shape[1:])  # [in, out / groups, *kernel]


def _of_matrices(node: Node, given: list[Value | None], out: int) -> int:
    a = given[0]
    assert a is not None
    return out * a.shape[0 if node.operator == "Gemm" and node.integer("transA", 0) else -1]


def _of_attention(node: Node, given: list[Value | None], out: int) -> int:
    rows, heads, queries, keys, key_width, value_width = attention_sizes(node, given)
    return rows * heads * queries * keys * (key_width + value_width)


def _of_einsum(node: Node, given: list[Value | None], out: int) -> int:
    sizes, _ = einsum_sizes(node, given)
    return math.prod(sizes.values()) if len(given) > 1 else 0


_TERMS: Mapping[str, Callable[[Node, list[Value | None], int], int]] = {
    **dict.fromkeys(("Conv", "ConvInteger"), _of_window),
    **dict.fromkeys(("MatMul", "MatMulInteger", "Gemm"), _of_matrices),
    "ConvTranspose": _of_transposed,
    "Attention": _of_attention,
    "Einsum": _of_einsum,
}
PRODUCTS = tuple(_TERMS)


def operations(node: Node, values: Mapping[str, Value]) -> int:
    """Those of one of ``PRODUCTS``: two for each multiplication that is added to a sum."""
    given = [values[name] if name else None for name in node.inputs]
    out = values[node.outputs[0]].entries
    return 2 * _TERMS[node.operator](node, given, out)
