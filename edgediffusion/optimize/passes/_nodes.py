"""What passes do to a graph again and again: add a constant, name a node's output, drop what nothing reads."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new initializer of ``graph``; ``name`` must be free."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value


def like(node: ir.Node, value: ir.Value, name: str) -> ir.Value:
    """The one output of ``node``, named, with the shape and type of ``value``."""
    output = node.outputs[0]
    output.name, output.shape, output.type = name, value.shape, value.type
    return output


def drop_unread(graph: ir.Graph) -> None:
    """Remove the initializers that nothing reads."""
    kept = set(graph.outputs)
    for name in [name for name, value in graph.initializers.items() if not value.uses() and value not in kept]:
        del graph.initializers[name]
