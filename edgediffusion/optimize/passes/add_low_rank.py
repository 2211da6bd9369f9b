"""Add float branches of low rank beside quantized matrix products: see ``optimize/low_rank.py``.

x ─ Q ─ DQ ─ MatMul(R8 ─ DQ) ─ Add ─ y
└─ MatMul(down^T) ─ MatMul(up^T) ──┘
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgediffusion.optimize.graph_layers import find_layers
from edgediffusion.optimize.passes._nodes import constant
from edgediffusion.optimize.state import LayerState


@dataclass(frozen=True)
class Place:
    """Where a branch begins, what it is added to, and what it computes with: ``down`` [in, rank], ``up`` [rank, out]."""

    name: str
    source: ir.Value
    given: ir.Value
    down: np.ndarray
    up: np.ndarray


def places(model: ir.Model, states: Mapping[str, LayerState]) -> list[Place]:
    """Where branches belong: to be asked before Q/DQ nodes stand there, so that a branch reads what is not quantized."""
    found = []
    for layer in find_layers(model.graph):
        state, source = states.get(layer.name), layer.node.inputs[0]
        if state is not None and state.up is not None and state.down is not None and source is not None:
            kind = layer.dtype.numpy()
            down = np.ascontiguousarray((state.down / state.factors).T).astype(kind)
            found.append(Place(layer.name, source, layer.given, down, np.ascontiguousarray(state.up.T).astype(kind)))
    return found


def add_low_rank(model: ir.Model, found: Sequence[Place]) -> None:
    """Add the branches to ``model`` in place."""
    graph = model.graph
    for place in found:
        given, producer = place.given, place.given.producer()
        assert producer is not None
        uses = list(given.uses())
        thin = ir.node("MatMul", [place.source, constant(graph, f"{place.name}.down", place.down)])
        wide = ir.node("MatMul", [thin.outputs[0], constant(graph, f"{place.name}.up", place.up)])
        added = ir.node("Add", [given, wide.outputs[0]])
        for node, suffix in ((thin, "thin"), (wide, "low_rank"), (added, "whole")):
            node.outputs[0].name, node.outputs[0].type = f"{place.name}.{suffix}", given.type
        wide.outputs[0].shape = added.outputs[0].shape = given.shape
        graph.insert_after(producer, [thin, wide, added])
        for use in uses:
            use.node.replace_input_with(use.idx, added.outputs[0])
        for at, output in enumerate(graph.outputs):
            if output is given:  # the caller knows it by its name
                given.name, added.outputs[0].name = added.outputs[0].name, given.name
                graph.outputs[at] = added.outputs[0]
