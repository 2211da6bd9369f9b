"""A skeleton becomes an ONNX graph whose initializers have names and no values yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from edgediffusion.errors import SourceError
from edgediffusion.export.families import FLOAT, Part, Tensor
from edgediffusion.export.quiet import quiet
from edgediffusion.export.skeleton import Skeleton


@dataclass(frozen=True)
class Traced:
    """``names`` maps the graph's initializers to the network's own names of parameters and buffers."""

    model: ir.Model
    names: Mapping[str, str]


def trace(part: Part, skeleton: Skeleton, dtype: torch.dtype, opset: int) -> Traced:
    """Trace a part with the sizes of its axes as examples; the named axes stay free.

    Raises:
        SourceError: the exporter does not get through this network.
    """
    wrapped = part.wrap(skeleton.network).eval()
    prefix = next(f"{name}." for name, child in wrapped.named_children() if child is skeleton.network)
    with skeleton.fake:
        arguments = {i.name: torch.zeros(i.example, dtype=_dtype(i, dtype)) for i in part.inputs}
    with quiet(), torch.no_grad():
        try:
            exported = torch.export.export(wrapped, (), arguments, dynamic_shapes=_dynamic_shapes(part), strict=False)
            program = torch.onnx.export(exported, dynamo=True, opset_version=opset, optimize=False, verbose=False)
        except Exception as error:  # the exporter raises whatever the networks and its own stages do
            raise SourceError(
                f"The component '{part.name}' cannot be exported: {_root(error)}", do="Please report this network."
            ) from error
    if program is None:
        raise SourceError(f"The component '{part.name}' cannot be exported", do="Please report this network.")
    _name_interface(program.model, part)
    return Traced(program.model, {name: name.removeprefix(prefix) for name in program.model.graph.initializers})


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
                unit = units.setdefault(axis.name, torch.export.Dim(f"{axis.name}_unit", min=1))
                shapes[tensor.name][place] = axis.multiple * unit if axis.multiple > 1 else torch.export.Dim.DYNAMIC
    return shapes


def _name_interface(model: ir.Model, part: Part) -> None:
    """Give outputs and free axes the names of the part, all through the graph."""
    values = [*model.graph.inputs, *model.graph.outputs]
    tensors = [*part.inputs, *part.outputs]
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
