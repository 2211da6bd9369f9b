"""A graph said in an older ONNX operator set: what that one lacks is decomposed, what changed since is put in its older form.

For each node one of these cases, told apart by ONNX's own schemas of the two sets:

1. its operator is the same in both: it stays as it is;
2. the older set lacks it, and a rule writes it with operators that the set has (``lower_nodes``);
3. it takes what it takes in another form there, and a rule changes that (``lower_forms``);
4. its operator only came to take more types or attributes: it stays, if it uses none of these;
5. else the graph is refused.

onnx's own version converter has no way down for Attention, GroupNormalization, Gelu and RMSNormalization, and onnxscript's goes up only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx.defs
import onnx.helper
import onnx_ir as ir

from edgediffusion.export import lower_forms, lower_nodes
from edgediffusion.export.group_norm import lower_group_norm
from edgediffusion.export.lower_writer import Refused, Rule, Writer

OLDEST = 17  # the first with LayerNormalization
_GROUP_NORM = 21  # the first whose GroupNormalization has a scale for each channel
RULES: Mapping[str, Rule] = {**lower_nodes.RULES, **lower_forms.RULES}

# Values of attributes that came with a later operator set, where schemas only say that there is such an attribute.
NEWER_WORDS = {
    ("Pad", "mode", "wrap"): 19,
    ("Resize", "coordinate_transformation_mode", "half_pixel_symmetric"): 19,
    ("ScatterElements", "reduction", "max"): 18,
    ("ScatterElements", "reduction", "min"): 18,
    ("ScatterND", "reduction", "max"): 18,
    ("ScatterND", "reduction", "min"): 18,
    ("GridSample", "mode", "linear"): 20,  # called bilinear before
    ("GridSample", "mode", "cubic"): 20,
}


@dataclass(frozen=True)
class Lowered:
    """``rewritten`` counts the nodes that were decomposed or changed, by operator; ``refused`` has the reason of each that cannot be."""

    opset_before: int
    opset: int
    rewritten: Mapping[str, int]
    refused: tuple[str, ...]


def lower_model(model: ir.Model, opset: int) -> Lowered:
    """Lower ``model`` in place; one of that operator set, or of an older one, stays as it is. Where something is refused, the
    model is of no use any more."""
    before = int(model.opset_imports[""])
    if before <= opset:
        return Lowered(before, before, {}, ())
    rewritten: Counter[str] = Counter()
    refused: list[str] = []
    if before >= _GROUP_NORM > opset and (groups := _lower_group_norm(model)):
        rewritten["GroupNormalization"] = groups
    graphs: tuple[ir.Graph | ir.Function, ...] = (model.graph, *model.functions.values())
    for graph in graphs:
        since = int(graph.opset_imports.get("", before))
        if since > opset:
            _lower_graph(graph, since, opset, rewritten, refused)
            graph.opset_imports[""] = opset
    model.opset_imports[""] = opset
    model.ir_version = min(model.ir_version, onnx.helper.OP_SET_ID_VERSION_MAP["ai.onnx", opset])
    return Lowered(before, opset, dict(sorted(rewritten.items())), tuple(dict.fromkeys(refused)))


def _lower_group_norm(model: ir.Model) -> int:
    names = [value.name for value in model.graph.outputs]
    found = lower_group_norm(model)
    for value, name in zip(model.graph.outputs, names, strict=True):
        value.name = name
    return found


def _lower_graph(graph: ir.Graph | ir.Function, since: int, opset: int, rewritten: Counter[str], refused: list[str]) -> None:
    """Subgraphs of If and Loop are lowered too: ``all_nodes`` has their nodes."""
    inside = isinstance(graph, ir.Function)
    for node in list(graph.all_nodes()):
        if node.domain not in ("", "ai.onnx"):
            continue
        try:
            if _since(node.op_type, since) <= opset:
                continue
            if node.op_type not in RULES:
                _check(node, since, opset)
            elif RULES[node.op_type](node, Writer(node, since, opset, in_function=inside)):
                rewritten[node.op_type] += 1
        except Refused as reason:
            refused.append(str(reason))


def _since(operator: str, opset: int) -> int:
    try:
        return int(onnx.defs.get_schema(operator, opset, "").since_version)
    except onnx.defs.SchemaError:
        raise Refused(f"'{operator}' is no operator of opset {opset}") from None


def _check(node: ir.Node, since: int, opset: int) -> None:
    """Case 4, or refuse: everything that the node has is known to the older operator, or says what that one does anyway."""
    new = onnx.defs.get_schema(node.op_type, since, "")
    try:
        old = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        raise Refused(f"{node.op_type} is of opset {new.since_version}") from None
    for name, attribute in list(node.attributes.items()):
        needed = NEWER_WORDS.get((node.op_type, name, str(attribute.value)), 0)
        if needed > opset:
            raise Refused(f"{node.op_type} with {name} '{attribute.value}' is of opset {needed}")
        if name not in old.attributes:
            if attribute.value != _default(new, name):
                raise Refused(f"{node.op_type} with {name} {attribute.value} is of a later opset")
            del node.attributes[name]
    if any(value is not None for value in node.inputs[old.max_input :]):
        raise Refused(f"{node.op_type} with {len(node.inputs)} inputs is of a later opset")
    for values, parameters in ((node.inputs, old.inputs), (node.outputs, old.outputs)):
        for value, parameter in _pairs(values, parameters):
            if value.dtype is not None and (name := f"tensor({_NAMES.get(value.dtype, value.dtype.name.lower())})") not in parameter.types:
                raise Refused(f"{node.op_type} of {name[7:-1]} is of a later opset")
    if node.op_type in ("Cast", "CastLike") and not _casts(node, old):
        raise Refused(f"{node.op_type} to {ir.DataType(node.attributes['to'].as_int()).name.lower()} is of a later opset")


_Parameter = onnx.defs.OpSchema.FormalParameter
_NAMES = {ir.DataType.FLOAT: "float", ir.DataType.DOUBLE: "double"}


def _default(schema: onnx.defs.OpSchema, name: str) -> object:
    default = schema.attributes[name].default_value
    value = onnx.helper.get_attribute_value(default) if default.type else None
    return value.decode() if isinstance(value, bytes) else value


def _pairs(values: Sequence[ir.Value | None], parameters: Sequence[_Parameter]) -> Iterator[tuple[ir.Value, _Parameter]]:
    """Values with what the schema says of each; the last parameter is that of all that follow, if it takes any number."""
    for at, value in enumerate(values):
        if value is not None and parameters:
            yield value, parameters[min(at, len(parameters) - 1)]


def _casts(node: ir.Node, old: onnx.defs.OpSchema) -> bool:
    """Nodes of functions have no types: what a Cast gives is in its attribute."""
    if "to" not in node.attributes:
        return True
    dtype = ir.DataType(node.attributes["to"].as_int())
    return f"tensor({_NAMES.get(dtype, dtype.name.lower())})" in old.outputs[0].types
