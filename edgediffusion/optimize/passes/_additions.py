"""New nodes and constants of one graph, under names that are free."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from edgediffusion.optimize.passes._nodes import constant


class Additions:
    """Adds to one graph and remembers the names."""

    def __init__(self, graph: ir.Graph):
        self.graph = graph
        self._names: dict[str, int] = {}

    def made(
        self,
        node: ir.Node,
        name: str,
        like: ir.Value,
        dtype: ir.DataType,
        *,
        before: ir.Node | None = None,
        after: ir.Node | None = None,
    ) -> ir.Value:
        """Put a node into the graph; returns its first output, named and shaped like ``like``."""
        output = node.outputs[0]
        output.name, output.shape = self.unused(name), like.shape
        output.dtype = dtype
        if before is not None:
            self.graph.insert_before(before, [node])
        elif after is not None:
            self.graph.insert_after(after, [node])
        return output

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        return constant(self.graph, self.unused(name), array)

    def later(self, name: str, values: Callable[[], np.ndarray], dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
        """A constant that is computed when it is written, and not kept: a network's weights need not fit into memory."""
        name = self.unused(name)
        tensor = ir.LazyTensor(lambda: ir.tensor(values(), dtype=dtype, name=name), dtype, ir.Shape(shape), name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.graph.register_initializer(value)
        return value

    def unused(self, name: str) -> str:
        """The name, numbered where it is taken: one tensor may be quantized in several ways."""
        taken = self._names.get(name, 0)
        self._names[name] = taken + 1
        return f"{name}.{taken}" if taken else name
