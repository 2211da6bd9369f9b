"""The traced graph made small, and free of everything that tells about the machine that traced it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import optimize_ir

from edgediffusion.export.quiet import quiet
from edgediffusion.export.rule_gates import gated

MOST_FOLDED_BYTES = 1 << 16
_NEARLY_ZERO = 1e-7  # its tolerance is 1e-8, in float32 and in whatever it may become


def simplify(model: ir.Model) -> None:
    """Fold what is constant, but nothing that a weight is in: a folded weight would be a copy of it in the file."""
    _remove_idle_squeezes(model)
    with quiet(), _tiny_terms_hidden(model.graph), gated():
        optimize_ir(model, onnx_shape_inference=False, should_fold=_touches_no_weight, output_size_limit=MOST_FOLDED_BYTES)
        common.RemoveUnusedNodesPass()(model)
        common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass()(model)
        # The tracer notes the line of the source file that each node comes from: paths and stack traces.
        common.ClearMetadataAndDocStringPass()(model)
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *(v for node in model.graph.all_nodes() for v in node.outputs)):
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name = "main"


@contextmanager
def _tiny_terms_hidden(graph: ir.Graph) -> Iterator[None]:
    """Within the block, constants that are added and nearly zero are inputs: onnxscript takes 1e-15 for zero and drops the addition.

    Linear attention divides by a sum plus such a number, so that a token that attends to nothing is zero and not 0 / 0.
    """
    hidden: list[tuple[ir.Value, ir.TensorProtocol]] = []
    for node in [node for node in graph if node.op_type in ("Add", "Sub")]:
        for place, value in enumerate(node.inputs):
            tensor = None if value is None else ir.convenience.get_const_tensor(value)
            if tensor is not None and tensor.size == 1 and 0 < abs(tensor.numpy().item()) <= _NEARLY_ZERO:
                term = ir.Value(name=f"tiny_{len(hidden)}", shape=ir.Shape(tensor.numpy().shape), type=ir.TensorType(tensor.dtype))
                node.replace_input_with(place, term)
                graph.inputs.append(term)
                hidden.append((term, tensor))
    yield
    for term, tensor in hidden:
        graph.inputs.remove(term)
        term.const_value = ir.tensor(tensor.numpy(), name=term.name)
        graph.register_initializer(term)


def _remove_idle_squeezes(model: ir.Model) -> None:
    """torch leaves an axis alone that it is asked to squeeze and that has more than one entry; ONNX's Squeeze is an error there."""
    for node in [node for node in model.graph if node.op_type == "Squeeze"]:
        taken, given = node.inputs[0], node.outputs[0]
        if taken is not None and taken.shape is not None and given.shape is not None and taken.shape.rank() == given.shape.rank():
            ir.convenience.replace_all_uses_with(given, taken, replace_graph_outputs=True)
            model.graph.remove(node, safe=True)


def _touches_no_weight(node: ir.Node) -> bool | None:
    """False forbids to fold a node, None leaves it to the optimizer."""
    return False if any(value is not None and value.is_initializer() for value in node.inputs) else None
