"""Sizes that a graph reads off what a ControlNet gives, read off the sample:

    Shape(mid_block_additional_residual)[2:3]  ->  Div(Shape(sample)[2:3], 8)        where that axis is ``height/8``

The tracer takes each free size from the input where it is simplest. A shallow graph would then take residuals of the deepest
level for their sizes alone, and their ControlNet would have to compute them.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgediffusion.export.skip_cuts import DOWN, MID

SAMPLE = "sample"


def read_off_sample(model: ir.Model) -> int:
    """Rewrite the sizes of residuals in place; returns how many there were. A graph without residuals stays as it is."""
    inputs = {str(value.name): value for value in model.graph.inputs}
    residuals = [value for name, value in inputs.items() if name.startswith((DOWN, MID))]
    nodes = [use.node for value in residuals for use in value.uses() if use.node.op_type == "Shape" and _axis(use.node) is not None]
    for node in nodes:
        _rewrite(model.graph, node, inputs[SAMPLE])
    return len(nodes)


def _axis(node: ir.Node) -> int | None:
    """The one axis whose size a Shape node gives."""
    start, end = (node.attributes.get(name) for name in ("start", "end"))
    if start is None or end is None or end.as_int() != start.as_int() + 1:
        return None
    return start.as_int()


def _rewrite(graph: ir.Graph, node: ir.Node, sample: ir.Value) -> None:
    value, axis, output = node.inputs[0], _axis(node), node.outputs[0]
    assert value is not None
    assert value.shape is not None
    assert sample.shape is not None
    assert axis is not None
    name, _, part = str(value.shape[axis]).partition("/")
    place = [str(size) for size in sample.shape].index(name)
    made = [ir.node("Shape", [sample], attributes={"start": place, "end": place + 1}, name=f"{output.name}.of_sample")]
    if part:
        divisor = ir.tensor(np.array([int(part)], np.int64), name=f"{output.name}.part")
        constant = ir.Value(name=divisor.name, const_value=divisor, shape=ir.Shape([1]), type=ir.TensorType(divisor.dtype))
        graph.register_initializer(constant)
        made.append(ir.node("Div", [made[0].outputs[0], constant], name=f"{output.name}.divided"))
    for new in made:
        new.outputs[0].name, new.outputs[0].type, new.outputs[0].shape = new.name, ir.TensorType(ir.DataType.INT64), ir.Shape([1])
    graph.insert_before(node, made)
    ir.convenience.replace_all_uses_with(output, made[-1].outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)
