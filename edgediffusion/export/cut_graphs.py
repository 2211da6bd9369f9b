"""Cut graphs: parts of a denoiser's graph as graphs of their own, made by taking nodes away and never by tracing again.

    whole      inputs ─ A ─┬─ B ─ out_sample            the values at the cut have names in the whole graph
    head       inputs ─ A ─ values                      they become outputs,
    tail       values ─ B ─ out_sample                  or inputs, and what only made them goes
    shallow    a tail that is given something old: a UNet's feature, or what a transformer's blocks added (``residual``)

So all of them have the same weights, in the same file, the same codes once it is quantized, and rounding errors in common. Only
two values are made here, both differences (``_difference``): ``<cut>.residual``, which a tail gives and a shallow graph adds to
the stream at the cut in place of the blocks behind it, and ``<cut>.indicator`` where the network has no such value itself.

Nothing here looks at the source: a pass over the whole graph, such as quantization, is followed by cutting it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgediffusion.bundle import Component, TensorSpec
from edgediffusion.errors import BundleError
from edgediffusion.export.bfloat16 import speak_float32
from edgediffusion.files import link_or_copy

LAST = "last_block.hidden_states"  # the sample's stream behind the last block of a transformer
STREAM, CONTEXT, RESIDUAL, INDICATOR = ".hidden_states", ".encoder_hidden_states", ".residual", ".indicator"


def write_part(whole: ir.Model, weights: Path, part: Component, bundle: Path) -> Component:
    """Cut ``part`` out of ``whole`` and write it into its place in the folder ``bundle``; returns it as it became.

    ``whole`` is not changed. Its weights are files of the folder ``weights``, which are linked.

    Raises:
        BundleError: see ``derive``.
    """
    found, model = derive(whole, part)
    file = bundle / part.model
    tensors = [value.const_value for value in model.graph.initializers.values()]
    for location in sorted({str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}):
        name = Path(location).name
        link_or_copy(weights / name, file.parent / name)
    file.parent.mkdir(exist_ok=True)
    ir.save(model, file)
    return found


def derive(whole: ir.Model, part: Component) -> tuple[Component, ir.Model]:
    """The graph of ``part``, a component with a cut, out of the whole graph.

    Inputs of ``part`` that are values of the whole graph become inputs, and its outputs are found or made. Inputs of the
    whole graph that it needs besides are added to the component that is returned.

    Raises:
        BundleError: the whole graph lacks a value at the cut.
    """
    model = whole.clone()
    graph = model.graph
    _add_differences(graph, part)
    named = [spec.name for spec in part.inputs]
    boundary = [*named, *(str(value.name) for value in graph.inputs if value.name not in named)]
    outputs = [spec.name for spec in part.outputs]
    for name in (*boundary, *outputs):
        _value(graph, name, part)
    found = ir.convenience.extract(graph, boundary, outputs)
    for value in list(found.inputs):
        if not value.uses() and value.name not in named:
            found.inputs.remove(value)
    for name in [name for name in graph.initializers if name in found.initializers]:  # extract gives them in no order
        found.initializers[name] = found.initializers.pop(name)
    speak_float32(found)
    _state_types(found, part)
    functions = list(model.functions.values())
    made_by = (whole.producer_name, whole.producer_version)
    cut = ir.Model(found, ir_version=whole.ir_version, producer_name=made_by[0], producer_version=made_by[1], functions=functions)
    return replace(part, inputs=specs(found.inputs)), cut


def first_block(cut: str) -> str:
    """The first block of the network that ``cut`` is one of: ``blocks.0`` for ``blocks.7``, and for ``single_blocks.7``, behind them."""
    return cut.rpartition(".")[0].removeprefix("single_") + ".0"


def specs(values: Iterable[ir.Value]) -> tuple[TensorSpec, ...]:
    return tuple(_spec(value) for value in values)


def _spec(value: ir.Value) -> TensorSpec:
    assert value.shape is not None
    assert value.dtype is not None
    shape = tuple(str(dim.value) if isinstance(dim, ir.SymbolicDim) else int(dim) for dim in value.shape)
    return TensorSpec(str(value.name), np.dtype(value.dtype.numpy()).name, shape)


def _add_differences(graph: ir.Graph, part: Component) -> None:
    """Make those values of ``part`` that no network has."""
    stream = f"{part.cut}{STREAM}"
    if any(spec.name == f"{part.cut}{RESIDUAL}" for spec in part.inputs):
        _add_residual(graph, part)
    for spec in part.outputs:
        if spec.name == f"{part.cut}{RESIDUAL}":
            _difference(graph, LAST, stream, spec.name, part)
        elif spec.name == f"{part.cut}{INDICATOR}" and spec.name not in _values(graph):
            _difference(graph, stream, f"{first_block(str(part.cut))}{STREAM}", spec.name, part)


def _state_types(graph: ir.Graph, part: Component) -> None:
    """Type and shape of what it takes and gives, as the component has them: a pass may have left a value without."""
    stated = {spec.name: spec for spec in (*part.inputs, *part.outputs)}
    for value in (*graph.inputs, *graph.outputs):
        if str(value.name) in stated:
            spec = stated[str(value.name)]
            value.shape, value.dtype = ir.Shape(spec.shape), ir.DataType.from_numpy(np.dtype(spec.dtype))


def _add_residual(graph: ir.Graph, part: Component) -> None:
    """Let the last block's stream be the stream at the cut plus an input, what the blocks between added at another step."""
    last, stream = _value(graph, LAST, part), _value(graph, f"{part.cut}{STREAM}", part)
    residual = ir.Value(name=f"{part.cut}{RESIDUAL}", shape=stream.shape, type=stream.type)
    graph.inputs.append(residual)
    total = _insert(graph, ir.node("Add", [stream, residual]), f"{part.cut}.moved", stream, after=last)
    for use in last.uses():
        if use.node is not total.producer():
            use.node.replace_input_with(use.idx, total)


def _difference(graph: ir.Graph, later: str, earlier: str, name: str, part: Component) -> None:
    minuend, subtrahend = _value(graph, later, part), _value(graph, earlier, part)
    _insert(graph, ir.node("Sub", [minuend, subtrahend]), name, minuend, after=minuend)


def _insert(graph: ir.Graph, node: ir.Node, name: str, like: ir.Value, *, after: ir.Value) -> ir.Value:
    output = node.outputs[0]
    output.name, output.shape, output.type = name, like.shape, like.type
    producer = after.producer()
    assert producer is not None
    graph.insert_after(producer, [node])
    return output


def _values(graph: ir.Graph) -> dict[str, ir.Value]:
    return ir.convenience.create_value_mapping(graph, include_subgraphs=False)


def _value(graph: ir.Graph, name: str, part: Component) -> ir.Value:
    found = _values(graph).get(name)
    if found is None:
        raise BundleError(
            f"The graph of the denoiser has no value '{name}', so '{part.name}' cannot be cut out of it",
            do=f"Export the pipeline again with --cut {part.cut}.",
        )
    return found


def part_of(whole: Component, role: str, cut: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Component:
    """A component for the part of ``whole`` that a cut makes; its name is its folder."""
    name = f"{whole.name}_{role.rsplit('.', 1)[-1]}_{cut.replace('.', '_')}"
    return Component(name, role, f"{name}/{whole.model.rsplit('/', 1)[-1]}", tuple(inputs), tuple(outputs), cut=cut)
