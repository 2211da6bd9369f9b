"""Types and shapes of what a node makes, from those of what it reads: one rule an operator, with sizes that are numbers.

The rules are those of the operators' own pages (onnx.ai/onnx/operators). Shapes that a graph computes (of ``Shape``, through
``Concat`` and products, into ``Reshape``) are computed: values of few entries are carried along as numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from edgediffusion.runtimes.onnx_header import TYPES
from edgediffusion.runtimes.onnx_nodes import Node
from edgediffusion.runtimes.shapes.moves import MOVES
from edgediffusion.runtimes.shapes.products import SUMS, attention_sizes, einsum_sizes
from edgediffusion.runtimes.shapes.same import SAME
from edgediffusion.runtimes.shapes.value import SMALL, Rule, Value, Values

__all__ = ["RULES", "Value", "attention_sizes", "einsum_sizes", "infer"]

RULES: Mapping[str, Rule] = {**SAME, **MOVES, **SUMS}
_NUMPY = ("float32", "float64", "int32", "int64", "bool")


def infer(node: Node, given: Values) -> list[Value] | None:
    """What a node makes of its inputs (None for one that is left out); None where there is no rule, or too little is known.

    Raises:
        ValueError, IndexError, KeyError, TypeError: the node does not fit what it is given.
    """
    rule = RULES.get(node.operator)
    if rule is None:
        return None
    found = rule(node, given)
    fixed = all(value is None or value.constant for value in given)
    data = _computed(node, given) if len(found) == 1 and found[0].data is None and found[0].entries <= SMALL else None
    if data is not None:
        found = [Value(found[0].dtype, data.shape, data)]
    return [Value(value.dtype, value.shape, value.data, fixed) for value in found]


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of whole numbers towards zero, as ONNX divides."""
    return np.asarray(a / b if a.dtype.kind == "f" else np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b)), a.dtype)


_COMPUTE: Mapping[str, Callable[..., np.ndarray]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": _divide,
    "Mod": np.mod,
    "Max": np.maximum,
    "Min": np.minimum,
    "Equal": np.equal,
    "Less": np.less,
    "Greater": np.greater,
    "Where": np.where,
    "Floor": np.floor,
    "Ceil": np.ceil,
    "Neg": np.negative,
    "Sqrt": np.sqrt,
    "Identity": np.array,
}


def _computed(node: Node, given: Values) -> np.ndarray | None:
    """The entries of a node's result, where those of its inputs are known and it is one that shapes go through."""
    data = [value.data for value in given if value is not None and value.data is not None]
    if not data or len(data) != sum(value is not None for value in given):
        return None
    if node.operator in _COMPUTE:
        return np.asarray(_COMPUTE[node.operator](*data))
    return _MOVE[node.operator](node, given, data) if node.operator in _MOVE else None


def _concatenate(node: Node, given: Values, data: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(data, node.integer("axis", 0))


def _take(node: Node, given: Values, data: list[np.ndarray]) -> np.ndarray:
    return np.take(data[0], data[1].astype(np.int64), node.integer("axis", 0))


def _as_type(node: Node, given: Values, data: list[np.ndarray]) -> np.ndarray:
    dtype = TYPES[node.integer("to", 1)]
    return data[0].astype(dtype if dtype in _NUMPY else np.float32)


def _multiplied(node: Node, given: Values, data: list[np.ndarray]) -> np.ndarray:
    return np.asarray(np.prod(data[0], keepdims=bool(node.integer("keepdims", 1))))


def _part(node: Node, given: Values, data: list[np.ndarray]) -> np.ndarray:
    step = int(data[4].item()) if len(data) > 4 else 1
    along = [slice(None)] * data[0].ndim
    along[int(data[3].item()) if len(data) > 3 else 0] = slice(int(data[1].item()), int(data[2].item()) if step > 0 else None, step)
    return data[0][tuple(along)]


def _counted(node: Node, given: Values, data: list[np.ndarray]) -> np.ndarray:
    start, end, step = (value.item() for value in data)
    return np.arange(start, end, step).astype(data[0].dtype)


def _reshaped(node: Node, given: Values, data: list[np.ndarray]) -> np.ndarray:
    shape = RULES[node.operator](node, given)[0].shape
    return np.broadcast_to(data[0], shape) if node.operator == "Expand" else data[0].reshape(shape)


_MOVE: Mapping[str, Callable[[Node, Values, list[np.ndarray]], np.ndarray]] = {
    **dict.fromkeys(("Reshape", "Unsqueeze", "Squeeze", "Expand"), _reshaped),
    "Cast": _as_type,
    "Concat": _concatenate,
    "Gather": _take,
    "Range": _counted,
    "ReduceProd": _multiplied,
    "Slice": _part,
}
