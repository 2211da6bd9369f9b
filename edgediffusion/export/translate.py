"""An exported program becomes an ONNX program without being traced a second time, where nothing asks for it."""

from __future__ import annotations

import operator
import sys
from collections.abc import Mapping
from types import BuiltinFunctionType
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.onnx import OnnxExporterError, ONNXProgram

_ATEN = torch.ops.aten
_NOTHING_IN_INFERENCE = {
    _ATEN.alias.default,
    _ATEN.contiguous.default,
    _ATEN.detach.default,
    _ATEN.detach_.default,
    _ATEN.dropout.default,
    _ATEN.lift_fresh_copy.default,
}
_CASTS = {_ATEN.to.dtype, _ATEN.to.dtype_layout, _ATEN.to.device, _ATEN.to.other, _ATEN.type_as.default}
_RESHAPES = {_ATEN.flatten.using_ints, _ATEN.unflatten.int}


def translate(exported: ExportedProgram, opset: int) -> ONNXProgram:
    """The program in ONNX; ``exported`` is changed.

    torch.onnx.export begins with ``run_decompositions``, which traces the whole network again: a third of an export's time and
    more. It replaces operations that have no translation, of which diffusion networks have none, and does away with what
    writes in place and what does nothing, which is done here node by node. Where that is not enough, it is run after all.
    """
    if _ready(exported.graph_module):
        decompose = exported.run_decompositions
        exported.run_decompositions = lambda *_: exported
        try:
            return _onnx(exported, opset)
        except OnnxExporterError:  # an operation that has no translation after all
            exported.run_decompositions = decompose
    return _onnx(exported, opset)


def _onnx(exported: ExportedProgram, opset: int) -> ONNXProgram:
    program = torch.onnx.export(exported, dynamo=True, opset_version=opset, optimize=False, verbose=False)
    if program is None:
        raise OnnxExporterError("the exporter made nothing")
    return program


def _ready(module: torch.fx.GraphModule) -> bool:
    """Whether the graph writes nothing in place and has no graphs within, once what does nothing has left it."""
    sizes = _sizes_of_inputs(module.graph)
    for node in list(module.graph.nodes):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            sizes.setdefault(value.node.expr, node)
        if node.op != "call_function" or isinstance(node.target, BuiltinFunctionType):  # the latter calculate with sizes
            continue
        if node.target is _ATEN.sym_size.int and sizes[value.node.expr] is not node:
            node.replace_all_uses_with(sizes[value.node.expr])
            module.graph.erase_node(node)
        elif _does_nothing(node) and not any(user.op == "output" for user in node.users):  # the signature names the outputs
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        elif node.target in _RESHAPES:
            _as_reshape(node, sizes)
        elif node.target is _ATEN.split_with_sizes.default and not all(isinstance(size, int) for size in node.args[1]):
            _as_slices(node)
        elif getattr(getattr(node.target, "_schema", None), "is_mutable", True):
            return False
    for node in module.graph.find_nodes(op="call_function", target=_ATEN.sym_size.int):
        if not node.users:
            module.graph.erase_node(node)
    return True


def _sizes_of_inputs(graph: torch.fx.Graph) -> dict[Any, torch.fx.Node]:
    """Nodes right after the inputs that give their free sizes."""
    sizes: dict[Any, torch.fx.Node] = {}
    inputs = graph.find_nodes(op="placeholder")
    with graph.inserting_after(inputs[-1]):
        for node in inputs:
            for axis, size in enumerate(getattr(node.meta["val"], "shape", ())):
                if isinstance(size, torch.SymInt) and size.node.expr not in sizes:
                    found = sizes[size.node.expr] = graph.call_function(_ATEN.sym_size.int, (node, axis))
                    found.meta["val"] = size
    return sizes


def _does_nothing(node: Any) -> bool:
    if node.target in _CASTS:
        return bool(node.meta["val"].dtype == node.args[0].meta["val"].dtype)
    return node.target in _NOTHING_IN_INFERENCE


def _as_reshape(node: Any, sizes: Mapping[Any, torch.fx.Node]) -> None:
    """Give it the sizes of its result; where two of them are nowhere in the graph before it, it stays what it is."""
    shape = [size if isinstance(size, int) else sizes.get(size.node.expr, -1) for size in node.meta["val"].shape]
    if shape.count(-1) <= 1:
        node.target, node.args, node.kwargs = _ATEN.reshape.default, (node.args[0], shape), {}


def _as_slices(node: Any) -> None:
    """Parts of free sizes, cut out one by one: they would be an ONNX sequence, which TensorRT does not read."""
    tensor, sizes, axis = (*node.args, 0)[:3]
    graph, ends = node.graph, [0]
    with graph.inserting_before(node):
        for size in sizes[:-1]:
            ends.append(graph.call_function(operator.add, (ends[-1], size)) if ends[-1] else size)
        for part in list(node.users):
            start, end = (*ends, sys.maxsize)[part.args[1] : part.args[1] + 2]
            found = graph.call_function(_ATEN.slice.Tensor, (tensor, axis, start, end))
            found.meta["val"] = part.meta["val"]
            part.replace_all_uses_with(found)
            graph.erase_node(part)
    graph.erase_node(node)
