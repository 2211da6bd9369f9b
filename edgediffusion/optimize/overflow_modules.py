"""Nodes of a graph and the modules that they are of; a graph that tells the largest magnitude of each of its values.

A graph has no modules, but its weights have their names. A node with a weight is of that weight's module. A node without one is
of the smallest module that its inputs are of, and outside those that gave them: an activation behind a layer is not in the layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from edgediffusion.bundle import Component
from edgediffusion.files import link_or_copy

_PICTURES = ("decode", "encode_image")  # the roles of an autoencoder's graphs, whose component is called so in the source:
_AUTOENCODER = "vae"


@dataclass(frozen=True)
class Peak:
    """The largest magnitude of a node's value, and the smallest module that the value does not leave; empty for the whole network."""

    operator: str
    module: str
    largest: float


@dataclass(frozen=True)
class Tapped:
    """The nodes whose values are looked at, in the order of their magnitudes: operator and module of each."""

    nodes: tuple[tuple[str, str], ...]

    def peaks(self, largest: np.ndarray) -> list[Peak]:
        return [Peak(operator, module, float(value)) for (operator, module), value in zip(self.nodes, largest, strict=True)]


def kept_name(component: Component, module: str) -> str:
    """A module as ``export --keep-fp32`` takes it."""
    network = _AUTOENCODER if component.role in _PICTURES else component.name
    return f"{network}.{module}" if module else network


def tap(file: Path, tapped: Path, name: str) -> Tapped:
    """Write a copy of a graph that also gives, as the output ``name``, the largest magnitude of each float value in it."""
    import onnx_ir as ir

    model = ir.load(file)
    graph = model.graph
    for location in {str(v.const_value.location) for v in graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)}:
        link_or_copy(file.parent / location, tapped.parent / location)
    modules = _modules(graph)
    containers, given = _containers(modules.values()), set(graph.outputs)
    found: list[tuple[str, str]] = []
    scalars: list[Any] = []
    for node in list(graph):
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT and (value in given or value.uses()):
                found.append((node.op_type, "" if value in given else _home(value, node, modules, containers)))
                scalars.append(_magnitude(graph, value, len(scalars)))
    total = ir.node("Concat", scalars, attributes={"axis": 0}, name=name)
    total.outputs[0].name, total.outputs[0].shape, total.outputs[0].dtype = name, ir.Shape([len(scalars)]), ir.DataType.FLOAT
    graph.append(total)
    graph.outputs.append(total.outputs[0])
    ir.save(model, tapped)
    return Tapped(tuple(found))


def _magnitude(graph: Any, value: Any, number: int) -> Any:
    """max|x| as a tensor of one entry."""
    import onnx_ir as ir

    size = ir.node("Abs", [value], name=f"magnitude.{number}.abs")
    flat = ir.node("Reshape", [size.outputs[0], _shape(graph)], name=f"magnitude.{number}.flat")
    largest = ir.node("ReduceMax", [flat.outputs[0]], attributes={"keepdims": 1}, name=f"magnitude.{number}")
    for node in (size, flat, largest):
        node.outputs[0].name = f"{node.name}.value"
        graph.append(node)
    return largest.outputs[0]


def _shape(graph: Any) -> Any:
    import onnx_ir as ir

    if "magnitude.shape" not in graph.initializers:
        tensor = ir.tensor(np.array([-1]), name="magnitude.shape")
        graph.register_initializer(
            ir.Value(name="magnitude.shape", const_value=tensor, shape=ir.Shape([1]), type=ir.TensorType(tensor.dtype))
        )
    return graph.initializers["magnitude.shape"]


def _modules(graph: Any) -> dict[Any, tuple[str, bool]]:
    """Of every node its module, and whether a weight of that module is read by it, itself or through a node that has nothing else."""
    import onnx_ir as ir

    weights = {value for value in graph.initializers.values() if isinstance(value.const_value, ir.ExternalTensor)}
    constants = set(graph.initializers.values()) - weights
    carried = {value: str(value.name).rpartition(".")[0] for value in weights}  # a weight, and what is made of it alone
    found: dict[Any, tuple[str, bool]] = {}
    for node in graph:
        inputs = [value for value in node.inputs if value is not None and value not in constants]
        own = [carried[value] for value in inputs if value in carried]
        if own and len(own) == len(inputs):
            carried |= dict.fromkeys(node.outputs, own[0])
        if own:
            found[node] = (own[0], True)
            continue
        homes = [found[value.producer()] for value in inputs if value.producer() in found]
        found[node] = (_common([_parent(module) if leaf else module for module, leaf in homes]) if homes else "", False)
    return found


def _home(value: Any, node: Any, modules: Mapping[Any, tuple[str, bool]], containers: set[str]) -> str:
    """The smallest module that has the node and all that read its value in it."""
    users = [use.node for use in value.uses() if use.node in modules]
    common = _common([modules[node][0], *(modules[user][0] for user in users)])
    while common in containers:
        common = _parent(common)
    return common


def _containers(homes: Iterable[tuple[str, bool]]) -> set[str]:
    """Lists of modules, which nobody calls: all that is in them has a number for its name."""
    paths = [module.split(".") for module, _ in set(homes)]
    return {".".join(parts[:place]) for parts in paths for place, part in enumerate(parts) if place and part.isdecimal()}


def _common(paths: Sequence[str]) -> str:
    parts = [path.split(".") for path in paths]
    return ".".join(place[0] for place in takewhile(lambda place: len(set(place)) == 1, zip(*parts, strict=False)))


def _parent(path: str) -> str:
    return path.rpartition(".")[0]
