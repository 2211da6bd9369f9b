"""Let matrix products read rotated inputs (HQ-DiT, Liu and Zhang 2024, 2405.19751): outliers are shared out among channels.

    x w^T = (x H) (w H)^T        for H H^T = 1

    x ─ MatMul(w) ─ y      becomes      x ─ MatMul(H) ─ MatMul(w H) ─ y

Products that read one tensor share its rotation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgediffusion.optimize.graph_layers import ROTATION, find_layers
from edgediffusion.optimize.passes._nodes import constant, drop_unread, like
from edgediffusion.optimize.recipe import Recipe

SMALLEST = 4  # channels of a block: a rotation of two mixes next to nothing


def hadamard(channels: int) -> np.ndarray | None:
    """H, float32 [channels, channels]: blocks of the largest power of two that divides ``channels``, by Sylvester's construction.

    Symmetric and orthogonal. None where that power is under 4.
    """
    block = channels & -channels
    if block < SMALLEST:
        return None
    h = np.ones((1, 1))
    while len(h) < block:
        h = np.block([[h, h], [h, -h]])
    return np.kron(np.eye(channels // block), h / np.sqrt(block)).astype(np.float32)


def rotated_weight(weight: np.ndarray) -> np.ndarray:
    """w H of a weight [out, in]."""
    h = hadamard(weight.shape[1])
    assert h is not None
    return np.asarray((weight.astype(np.float64) @ h).astype(np.float32))


def rotatable(model: ir.Model, recipe: Recipe) -> list[str]:
    """The matrix products that ``recipe`` wants rotated, where their channels allow it."""
    layers = [layer for layer in find_layers(model.graph) if layer.node.op_type != "Conv" and recipe.rotates(layer.name)]
    return [layer.name for layer in layers if hadamard(layer.channels[0]) is not None]


def rotate(model: ir.Model, names: Sequence[str]) -> None:
    """Rotate the inputs and weights of the layers of ``names``, in place. Layer ``name`` becomes ``name.1``."""
    graph, rotated = model.graph, {}
    for layer in find_layers(graph):
        source = layer.node.inputs[0]
        if layer.name not in names or source is None:
            continue
        if source not in rotated:
            h = hadamard(layer.channels[0])
            assert h is not None
            product = ir.node("MatMul", [source, constant(graph, f"{layer.name}.0{ROTATION}", h.astype(layer.dtype.numpy()))])
            rotated[source] = like(product, source, f"{source.name}.rotated")
            graph.insert_before(layer.node, product)
        layer.node.replace_input_with(0, rotated[source])
        weight = rotated_weight(layer.read_weight())
        read = np.ascontiguousarray(weight.T) if layer.transposed else weight
        stored = constant(graph, f"{layer.name}.1.weight", read.astype(layer.dtype.numpy()))
        layer.node.replace_input_with(1, stored)
    drop_unread(graph)
