"""A skeleton becomes an ONNX graph whose initializers have names and no values yet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensor

from edgediffusion.errors import SourceError
from edgediffusion.export.families import FLOAT, Axis, Part, Tensor
from edgediffusion.export.marks import Mark, marked
from edgediffusion.export.quiet import quiet
from edgediffusion.export.skeleton import Skeleton
from edgediffusion.export.translate import translate

NO_MARKS: Mapping[str, Mark] = MappingProxyType({})


@dataclass(frozen=True)
class Traced:
    """``names`` maps the graph's initializers to the network's own names of parameters and buffers.

    ``constants`` are the tensors that the network's code made of numbers, which the tracer has names for.
    """

    model: ir.Model
    names: Mapping[str, str]
    constants: Mapping[str, torch.Tensor]


def trace(part: Part, skeleton: Skeleton, dtype: torch.dtype, opset: int, marks: Mapping[str, Mark] = NO_MARKS) -> Traced:
    """Trace a part with the sizes of its axes as examples; the named axes stay free. Marked tensors are its last outputs.

    Raises:
        SourceError: the exporter does not get through this network.
    """
    wrapped = part.wrap(skeleton.network).eval()
    prefix = next(f"{name}." for name, child in wrapped.named_children() if child is skeleton.network)
    with skeleton.fake:
        arguments = {i.name: torch.zeros(i.example, dtype=_dtype(i, dtype)) for i in part.inputs}
    with quiet(), torch.no_grad(), marked(wrapped, skeleton.network, marks):
        try:
            exported = torch.export.export(wrapped, (), arguments, dynamic_shapes=_dynamic_shapes(part), strict=False)
            program = translate(exported, opset)
        except Exception as error:  # the exporter raises whatever the networks and its own stages do
            raise SourceError(
                f"The component '{part.name}' cannot be exported: {_root(error)}", do="Please report this network."
            ) from error
    _name_interface(program.model, part, _marked_tensors(exported, part, marks))
    names = {name: name.removeprefix(prefix) for name in program.model.graph.initializers}
    real = {name: tensor for name, tensor in exported.constants.items() if not isinstance(tensor, FakeTensor)}
    return Traced(program.model, names, {names[name]: tensor for name, tensor in real.items() if name in names})


def _dtype(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if tensor.dtype == FLOAT else getattr(torch, tensor.dtype)


def _dynamic_shapes(part: Part) -> dict[str, dict[int, Any]]:
    """Axes that are known to be multiples are given as such: the graph then has no cases for odd sizes.

    For the others the tracer finds the range itself. What it finds are the sizes that take the same way through the
    network's Python code (diffusers has cases for 64 rows and more that compute the same); the graph takes any size.
    """
    units: dict[str, Any] = {}
    shapes: dict[str, dict[int, Any]] = {}
    for tensor in part.inputs:
        shapes[tensor.name] = {}
        for place, axis in enumerate(tensor.axes):
            if not isinstance(axis, int):
                base = axis.of or axis.name
                unit = units.setdefault(base, torch.export.Dim(f"{base}_unit", min=1))
                free = unit if axis.of else torch.export.Dim.DYNAMIC
                shapes[tensor.name][place] = axis.multiple * unit if axis.multiple > 1 else free
    return shapes


def _marked_tensors(exported: Any, part: Part, marks: Mapping[str, Mark]) -> tuple[Tensor, ...]:
    """The marked outputs, their axes told by those of the inputs."""
    given = {node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"}
    axes: dict[Any, Axis] = {}
    for tensor in part.inputs:
        for size, axis in zip(given[tensor.name].shape, tensor.axes, strict=True):
            if isinstance(axis, Axis):
                for symbol in size.node.expr.free_symbols:
                    axes.setdefault(symbol, axis)  # the first one is of the sample
    nodes = exported.graph.output_node().args[0][len(part.outputs) :]
    found = zip(marks, (node.meta["val"].shape for node in nodes), strict=True)
    return tuple(Tensor(name, tuple(_axis(name, size, axes) for size in shape)) for name, shape in found)


def _axis(name: str, size: Any, axes: Mapping[Any, Axis]) -> int | Axis:
    """A size, or a product of the inputs' axes over an integer, see ``bundle.axis_size``: ``height/2``, ``height*width/4``."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    of = {symbol: axis for symbol, axis in axes.items() if symbol in expression.free_symbols}
    product = math.prod(axis.example for axis in of.values())
    example = int(expression.xreplace({symbol: axis.example // axis.multiple for symbol, axis in of.items()}))
    if product % example:
        raise SourceError(f"The network cannot be cut at '{name}': sizes there are no parts of the inputs' sizes", got=str(expression))
    divided = f"/{product // example}" if product != example else ""
    return Axis("*".join(axis.name for axis in of.values()) + divided, example)


def _name_interface(model: ir.Model, part: Part, extra: tuple[Tensor, ...]) -> None:
    """Give outputs, ``extra`` ones after the part's, and free axes their names, all through the graph."""
    values = [*model.graph.inputs, *model.graph.outputs]
    tensors = [*part.inputs, *part.outputs, *extra]
    renamed: dict[str, str] = {}
    for value, tensor in zip(values, tensors, strict=True):
        if value in model.graph.inputs and value.name != tensor.name:
            raise SourceError(f"The inputs of '{part.name}' were traced in another order", got=value.name)
        value.name = tensor.name
        for dim, axis in zip(value.shape or (), tensor.axes, strict=True):
            if isinstance(dim, ir.SymbolicDim) != (not isinstance(axis, int)):
                raise SourceError(f"The tensor '{tensor.name}' of '{part.name}' was traced with another shape", got=value.shape)
            if isinstance(dim, ir.SymbolicDim) and not isinstance(axis, int):
                renamed[str(dim.value)] = axis.name
    for node in model.graph.all_nodes():
        for value in node.outputs:
            _rename_axes(value, renamed)
    for value in model.graph.inputs:
        _rename_axes(value, renamed)


def _rename_axes(value: ir.Value, renamed: Mapping[str, str]) -> None:
    if value.shape is not None:
        dims = [renamed.get(str(d.value), d) if isinstance(d, ir.SymbolicDim) else d for d in value.shape]
        value.shape = ir.Shape(dims)


def _root(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
