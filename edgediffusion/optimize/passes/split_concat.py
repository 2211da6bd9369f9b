"""Split convolutions that read a concatenation into one for each of its parts (Q-Diffusion, 2302.04304, section 4.2).

    Concat(a, b) ─ Conv(w) ─ y      becomes      a ─ Conv(w[:, :s]) ─┐
                                                 b ─ Conv(w[:, s:]) ─┴ Add ─ y

In the up path of a UNet, deep features and those of the skip connection differ in range by an order of magnitude. Apart, each has
scales of its own, for activations and for weights. Where a convolution reads the concatenation through a normalization and an
activation function, which keep the channels in their places, what it reads is split instead.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from edgediffusion.optimize.graph_layers import Layer, find_layers
from edgediffusion.optimize.passes._nodes import constant, drop_unread, like
from edgediffusion.optimize.recipe import Recipe

_THROUGH = ("Reshape", "InstanceNormalization", "GroupNormalization", "Mul", "Add", "Sigmoid", "Swish", "Cast")


def joined(model: ir.Model, recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Channels of the parts that each convolution reads which ``recipe`` wants split; those that it keeps float are left out."""
    found = {}
    for layer in find_layers(model.graph):
        if recipe.splits(layer.name) and layer.node.op_type == "Conv" and layer.groups == 1:
            parts = _parts(layer.node.inputs[0], layer.channels[0])
            if parts is not None:
                found[layer.name] = parts
    return found


def split_concat(model: ir.Model, sizes: Mapping[str, tuple[int, ...]]) -> None:
    """Split the convolutions that ``sizes`` names, in place. Layer ``name`` becomes ``name.0``, ``name.1``, …"""
    for layer in find_layers(model.graph):
        if layer.name in sizes:
            _split(model.graph, layer, sizes[layer.name])
    drop_unread(model.graph)


def _parts(value: ir.Value | None, channels: int) -> tuple[int, ...] | None:
    """Channels of the parts of the concatenation that ``value`` comes from."""
    producer = None if value is None else value.producer()
    if producer is None:
        return None
    if producer.op_type == "Concat" and producer.attributes.get_int("axis", 0) == 1:
        sizes = [part.shape[1] if part is not None and part.shape is not None else None for part in producer.inputs]
        whole = tuple(size for size in sizes if isinstance(size, int))
        return whole if len(whole) == len(sizes) and sum(whole) == channels else None
    return _parts(producer.inputs[0], channels) if producer.op_type in _THROUGH else None


def _split(graph: ir.Graph, layer: Layer, sizes: tuple[int, ...]) -> None:
    node, output = layer.node, layer.node.outputs[0]
    weight, total = layer.read_weight(), None
    for at, (source, part) in enumerate(zip(_sources(graph, layer, sizes), np.split(weight, np.cumsum(sizes)[:-1], 1), strict=True)):
        name = f"{layer.name}.{at}.weight"
        stored = constant(graph, name, np.ascontiguousarray(part).astype(layer.dtype.numpy()))
        bias = node.inputs[2:] if at == 0 else ()  # counts once
        conv = ir.Node("", "Conv", [source, stored, *bias], list(node.attributes.values()), name=f"{layer.name}.{at}")
        given = like(conv, output, f"{output.name}.{at}")
        graph.insert_before(node, conv)
        if total is None:
            total = given
        else:
            added = ir.node("Add", [total, given])
            graph.insert_before(node, added)
            total = like(added, output, f"{output.name}.sum{at}")
    assert total is not None
    for use in list(output.uses()):
        use.node.replace_input_with(use.idx, total)
    graph.remove(node, safe=True)


def _sources(graph: ir.Graph, layer: Layer, sizes: tuple[int, ...]) -> list[ir.Value]:
    """The parts of what the layer reads."""
    value = layer.node.inputs[0]
    assert value is not None
    producer = value.producer()
    if producer is not None and producer.op_type == "Concat":
        return [part for part in producer.inputs if part is not None]
    counts = constant(graph, f"{layer.name}.split", np.array(sizes, np.int64))
    split = ir.node("Split", [value, counts], attributes={"axis": 1}, num_outputs=len(sizes))
    graph.insert_before(layer.node, split)
    for at, (part, size) in enumerate(zip(split.outputs, sizes, strict=True)):
        part.name, part.type = f"{value.name}.part{at}", value.type
        if value.shape is not None:
            part.shape = ir.Shape([size if axis == 1 else dim for axis, dim in enumerate(value.shape)])
    return list(split.outputs)
