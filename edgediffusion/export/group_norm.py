"""``GroupNormalization(x, scale, bias)`` as an instance normalization over groups:

    x ─ Reshape [0, groups, -1] ─ InstanceNormalization ─ Reshape (shape of x) ─ Mul scale ─ Add bias

ONNX defines GroupNormalization as a function, and ONNX Runtime's CPU provider has no kernel for it: there it becomes a
dozen nodes in two dtypes, one seventh of the reference UNet's time (benchmarks/cpu_graph.py). InstanceNormalization is
a kernel in every engine that we build for, and engines that prefer the group form find this pattern.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def lower_group_norm(model: ir.Model) -> int:
    """Rewrite every GroupNormalization of ``model`` in place; returns how many there were."""
    nodes = [node for node in model.graph if node.op_type == "GroupNormalization"]
    for node in nodes:
        _lower(model.graph, node)
    return len(nodes)


def _lower(graph: ir.Graph, node: ir.Node) -> None:
    x, scale, bias = node.inputs
    output = node.outputs[0]
    assert x is not None
    assert scale is not None
    groups, epsilon = node.attributes["num_groups"].as_int(), node.attributes["epsilon"].as_float()
    dtype = (scale.dtype or ir.DataType.FLOAT).numpy()
    made: list[ir.Node] = []

    def add(op: str, inputs: list[ir.Value | None], **attributes: float) -> ir.Value:
        made.append(ir.node(op, inputs, attributes=attributes, name=f"{output.name}.{len(made)}.{op}"))
        value = made[-1].outputs[0]
        value.name = made[-1].name
        value.type = output.type
        return value

    def constant(name: str, values: np.ndarray) -> ir.Value:
        tensor = ir.tensor(values, name=f"{output.name}.{name}")
        value = ir.Value(name=tensor.name, const_value=tensor, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype))
        graph.register_initializer(value)
        return value

    grouped = add("Reshape", [x, constant("groups", np.array([0, groups, -1], np.int64))])
    ones, zeros = constant("ones", np.ones(groups, dtype)), constant("zeros", np.zeros(groups, dtype))
    normal = add("InstanceNormalization", [grouped, ones, zeros], epsilon=epsilon)
    shape = add("Shape", [x])
    shape.type = ir.TensorType(ir.DataType.INT64)
    back = add("Reshape", [normal, shape])
    rank = output.shape.rank() if output.shape is not None else 4
    axes = constant("axes", np.arange(1, rank - 1, dtype=np.int64))
    scaled = add("Mul", [back, add("Unsqueeze", [scale, axes])])
    result = add("Add", [scaled, add("Unsqueeze", [bias, axes])])
    result.shape = output.shape
    graph.insert_before(node, made)
    ir.convenience.replace_all_uses_with(output, result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
