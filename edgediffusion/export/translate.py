"""An exported program becomes an ONNX program without being traced a second time, where nothing asks for it."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping
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
    _ATEN.lift_fresh_copy.default,
}
_ASSERTIONS = {
    _ATEN._assert_async.default,
    _ATEN._assert_async.msg,
    _ATEN._assert_scalar.default,
    _ATEN._assert_tensor_metadata.default,
    _ATEN.sym_constrain_range_for_size.default,
}
_SYNONYMS = {
    _ATEN.__and__.Tensor: _ATEN.bitwise_and.Tensor,
    _ATEN.max.other: _ATEN.maximum.default,
    _ATEN.min.other: _ATEN.minimum.default,
}
_CASTS = {_ATEN.to.dtype, _ATEN.to.dtype_layout, _ATEN.to.device, _ATEN.to.other, _ATEN.type_as.default}
_MIXED = {  # dtypes that do not meet
    _ATEN._to_copy.default,
    _ATEN.argmax.default,
    _ATEN.embedding.default,
    _ATEN.scaled_dot_product_attention.default,
}
_RESHAPES = {_ATEN.flatten.using_ints, _ATEN.unflatten.int}


def translate(exported: ExportedProgram, opset: int) -> ONNXProgram:
    """The program in ONNX; ``exported`` is changed.

    torch.onnx.export begins with ``run_decompositions``, which traces the whole network again, and goes through it once more to see
    where dtypes are promoted: half of an export's time. The first replaces operations that have no translation and does away with
    what writes in place and what does nothing. Of these diffusion networks have few, which are replaced here node by node. Dtypes are
    looked at where they stand. Where that is not enough, both are run after all.
    """
    module = exported.graph_module
    if _ready(module):
        decompose = exported.run_decompositions
        exported.run_decompositions = lambda *_: exported
        if not any(_promotes(node) for node in module.graph.nodes):
            module.modules = lambda: iter(())  # it would go through each of these
        try:
            return _onnx(exported, opset)
        except OnnxExporterError:  # an operation that has no translation after all
            exported.run_decompositions = decompose
        finally:
            module.__dict__.pop("modules", None)
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
        if node.target in _ASSERTIONS:
            module.graph.erase_node(node)
        elif node.target is _ATEN.sym_size.int and sizes[value.node.expr] is not node:
            _replace(node, sizes[value.node.expr])
        elif _does_nothing(node) and not any(user.op == "output" for user in node.users):  # the signature names the outputs
            _replace(node, node.args[0])
        elif node.target in _RESHAPES:
            _as_reshape(node, sizes)
        elif node.target in _SYNONYMS:
            node.target = _SYNONYMS[node.target]
        elif node.target in _REWRITTEN:
            _REWRITTEN[node.target](node)
        elif getattr(getattr(node.target, "_schema", None), "is_mutable", True) and not _out_of_place(node):
            return False
    for node in module.graph.find_nodes(op="call_function", target=_ATEN.sym_size.int):
        if not node.users:
            module.graph.erase_node(node)
    return True


def _promotes(node: Any) -> bool:
    """Whether torch calculates in another dtype than that of what the node takes, or takes several."""
    if node.op != "call_function" or node.target in _MIXED:
        return False
    if any(_is_size(given) for given in _where_tensors_go(node)):
        return True
    nodes = node.args[1:] if node.target is _ATEN.where.self else node.all_input_nodes
    values = [found.meta.get("val") for found in (*nodes, node) if isinstance(found, torch.fx.Node)]
    *taken, given = (value.dtype if isinstance(value, torch.Tensor) else None for value in values)
    dtypes = {dtype for dtype in taken if dtype is not None}
    return len(dtypes) > 1 or (bool(dtypes) and given not in (None, torch.bool, *dtypes))


def _is_size(given: Any) -> bool:
    return isinstance(given, torch.fx.Node) and isinstance(given.meta.get("val"), torch.SymInt)


def _where_tensors_go(node: Any) -> list[Any]:
    """What is given for arguments that are tensors by the operation's schema: a size may be given as well."""
    arguments = getattr(getattr(node.target, "_schema", None), "arguments", ())
    return [given for argument, given in zip(arguments, node.args, strict=False) if str(argument.type) == "Tensor"]


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
    if node.target is _ATEN.dropout.default:
        return not node.args[2]  # some networks mean it, and drop out always
    return node.target in _NOTHING_IN_INFERENCE


def _as_reshape(node: Any, sizes: Mapping[Any, torch.fx.Node]) -> None:
    """Give it the sizes of its result; where two of them are nowhere in the graph before it, it stays what it is."""
    shape = [size if isinstance(size, int) else sizes.get(size.node.expr, -1) for size in node.meta["val"].shape]
    if shape.count(-1) <= 1:
        _become(node, _ATEN.reshape.default, node.args[0], shape)


def _out_of_place(node: Any) -> bool:
    """Make ``add_`` an ``add`` where nobody sees the difference: what it writes to is new, and read by nothing else."""
    name, _, overload = str(node.target).removeprefix("aten.").partition(".")
    written = node.args[0] if node.args else None
    if not name.endswith("_") or not hasattr(_ATEN, name[:-1]):
        return False
    if written is None or written.op != "call_function" or len(written.users) > 1:
        return False
    if any(found.alias_info is not None for found in written.target._schema.returns):  # a view of something
        return False
    node.target = getattr(getattr(_ATEN, name[:-1]), overload)
    return True


def _as_copy(node: Any) -> None:
    _become(node, _ATEN._to_copy.default, node.args[0], dtype=node.meta["val"].dtype)


def _as_permute(node: Any) -> None:
    tensor, taken, put = node.args
    order = list(range(node.meta["val"].dim()))
    order.insert(put % len(order), order.pop(taken))
    _become(node, _ATEN.permute.default, tensor, order)


def _as_sum(node: Any) -> None:
    """``rsub``, other - alpha x, as -alpha x + other."""
    tensor, other, alpha = (*node.args, 1)[:3]
    with node.graph.inserting_before(node):
        product = node.graph.call_function(_ATEN.mul.Tensor, (tensor, -alpha))
    product.meta["val"] = node.meta["val"]
    _become(node, _ATEN.add.Tensor, product, other)


def _as_slices(node: Any) -> None:
    """Parts of free sizes, cut out one by one: they would be an ONNX sequence, which TensorRT does not read."""
    tensor, sizes, axis = (*node.args, 0)[:3]
    if all(isinstance(size, int) for size in sizes):
        return
    graph = node.graph
    ends: list[Any] = [0]
    with graph.inserting_before(node):
        for size in sizes[:-1]:
            ends.append(_sum_of(graph, ends[-1], size) if ends[-1] else size)
        for part in list(node.users):
            start, end = (*ends, sys.maxsize)[part.args[1] : part.args[1] + 2]
            found = graph.call_function(_ATEN.slice.Tensor, (tensor, axis, start, end))
            found.meta["val"] = part.meta["val"]
            _replace(part, found)
    graph.erase_node(node)


def _sum_of(graph: torch.fx.Graph, *sizes: Any) -> torch.fx.Node:
    found = graph.call_function(operator.add, sizes)
    found.meta["val"] = sum(size.meta["val"] if isinstance(size, torch.fx.Node) else size for size in sizes)
    return found


def _become(node: Any, target: Any, *args: Any, **kwargs: Any) -> None:
    node.target, node.args, node.kwargs = target, args, kwargs


def _replace(node: Any, by: Any) -> None:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


_REWRITTEN: Mapping[Any, Callable[[Any], None]] = {
    **dict.fromkeys(_CASTS, _as_copy),
    _ATEN.movedim.int: _as_permute,
    _ATEN.rsub.Scalar: _as_sum,
    _ATEN.split_with_sizes.default: _as_slices,
}
