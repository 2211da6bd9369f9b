"""A graph that computes in bfloat16 speaks float32: NumPy, in which runtimes feed graphs, has no bfloat16.

    input ─ Cast ─ ...              ... ─ value ─ Cast ─ output

Where other nodes read a value that is an output, as those behind a cut do, they read the output cast back, so that a graph that
is cut there takes and gives float32 too. All of these casts are exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import onnx_ir as ir

from edgediffusion.bundle import Component, TensorSpec

NARROW = ir.DataType.BFLOAT16


def speak_float32(graph: ir.Graph) -> None:
    """Let the graph's inputs and outputs of bfloat16 be float32, in place."""
    for value in graph.inputs:
        if value.dtype == NARROW:
            value.dtype = ir.DataType.FLOAT
            users = tuple(value.uses())
            cast = _cast(value, NARROW, f"{value.name}.bfloat16")
            graph.insert_before(graph[0], cast)
            _give(cast.outputs[0], users)
    for place, value in enumerate(graph.outputs):
        if value.dtype == NARROW:
            graph.outputs[place] = _given_in_float32(graph, value)


def spoken(component: Component) -> Component:
    """The component of a graph as it is once it speaks float32."""
    return replace(component, inputs=tuple(map(_wide, component.inputs)), outputs=tuple(map(_wide, component.outputs)))


def _wide(spec: TensorSpec) -> TensorSpec:
    return replace(spec, dtype="float32") if spec.dtype == NARROW.name.lower() else spec


def _given_in_float32(graph: ir.Graph, value: ir.Value) -> ir.Value:
    name, users, producer = str(value.name), tuple(value.uses()), value.producer()
    assert producer is not None
    value.name = f"{name}.narrow"
    wide = _cast(value, ir.DataType.FLOAT, name)
    graph.insert_after(producer, wide)
    if users:
        back = _cast(wide.outputs[0], NARROW, f"{name}.bfloat16")
        graph.insert_after(wide, back)
        _give(back.outputs[0], users)
    return wide.outputs[0]


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], attributes={"to": dtype.value}, name=f"{name}.Cast")
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].dtype = name, value.shape, dtype
    return node


def _give(value: ir.Value, users: Iterable[tuple[ir.Node, int]]) -> None:
    for node, index in users:
        node.replace_input_with(index, value)
