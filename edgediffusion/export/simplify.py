"""The traced graph made small, and free of everything that tells about the machine that traced it."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import optimize_ir

from edgediffusion.export.quiet import quiet

MOST_FOLDED_BYTES = 1 << 16


def simplify(model: ir.Model) -> None:
    """Fold what is constant, but nothing that a weight is in: a folded weight would be a copy of it in the file."""
    with quiet():
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


def _touches_no_weight(node: ir.Node) -> bool | None:
    """False forbids to fold a node, None leaves it to the optimizer."""
    return False if any(value is not None and value.is_initializer() for value in node.inputs) else None
