"""What a rule of lowering writes with: new nodes before the one that they replace, in the older operator set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir


class Refused(Exception):
    """A node that the older operator set has no words for; its text says which and why."""


class Writer:
    """``since`` is the operator set of the node, ``opset`` the one to write in."""

    def __init__(self, node: ir.Node, since: int, opset: int, *, in_function: bool = False):
        self.node, self.since, self.opset = node, since, opset
        self._in_function, self._made = in_function, 0
        assert node.graph is not None
        self._graph = node.graph

    @property
    def dtype(self) -> ir.DataType:
        """Of the node's first input.

        Raises:
            Refused: it is not known.
        """
        source = self.node.inputs[0]
        known = source.dtype if source is not None and source.dtype is not None else self.node.outputs[0].dtype
        if known is None:
            raise Refused(f"{self.node.op_type} '{self.node.outputs[0].name}' is of an unknown type")
        return known

    def add(self, operator: str, *inputs: ir.Value | None, dtype: ir.DataType | None = None, **attributes: Any) -> ir.Value:
        """A new node's first output; its type is that of the first input if none is given."""
        node = ir.node(operator, inputs, attributes=attributes, name=self._name(operator))
        value = node.outputs[0]
        value.name = node.name
        known = dtype if dtype is not None or not inputs or inputs[0] is None else inputs[0].dtype
        if known is not None:  # values of functions have no types
            value.dtype = known
        self._graph.insert_before(self.node, [node])
        return value

    def constant(self, values: Any, dtype: ir.DataType | None = None) -> ir.Value:
        """A small constant; in a function, which has no initializers, a node."""
        array = np.asarray(values) if dtype is None else np.asarray(values, dtype.numpy())
        name = self._name("constant")
        tensor = ir.tensor(array, dtype=dtype, name=name)
        if self._in_function or not isinstance(self._graph, ir.Graph):
            value = self.add("Constant", dtype=tensor.dtype, value=tensor)
        else:
            value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
            self._graph.register_initializer(value)
        return value

    def finish(self, result: ir.Value) -> None:
        """Let ``result`` take the place of the node's output, and its name: cuts and callers know values by theirs."""
        output = self.node.outputs[0]
        result.shape, result.type = output.shape, output.type if output.type is not None else result.type
        name, output.name = output.name, f"{output.name}.replaced"
        ir.convenience.replace_all_uses_with(output, result, replace_graph_outputs=True)
        result.name = name
        self._graph.remove(self.node, safe=True)

    def _name(self, what: str) -> str:
        self._made += 1
        return f"{self.node.outputs[0].name}.{self._made}.{what}"


Rule = Callable[[ir.Node, Writer], bool]  # True where it changed something


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of a small constant, in the graph or made by a node; None for anything else."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None or isinstance(tensor, ir.ExternalTensor) else tensor.numpy()


def rank_of(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else int(value.shape.rank())


def size_of(value: ir.Value | None, axis: int) -> int | None:
    """The size of an axis, where it is a number."""
    if value is None or value.shape is None:
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None


def refuse_outputs(node: ir.Node, kept: int, names: Sequence[str]) -> None:
    """Refuse a node whose outputs behind the first ``kept`` are used."""
    graph = node.graph
    given = set(graph.outputs) if graph is not None else set()
    for name, output in zip(names, node.outputs[kept:], strict=False):
        if output.uses() or output in given:
            raise Refused(f"{node.op_type} that gives '{name}' too")
