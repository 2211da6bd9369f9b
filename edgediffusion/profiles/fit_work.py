"""A graph's work as an engine does it: what it fuses is no node of its own, and what another number format makes of it."""

from __future__ import annotations

from dataclasses import replace

from edgediffusion.runtimes.products import PRODUCTS
from edgediffusion.runtimes.work import GraphWork, NodeWork
from edgediffusion.targets.fit import Piece

_HALF = ("float16", "bfloat16")
_ATTENTION_PASSES = (
    4  # over its scores, where they are written: products write them, softmax reads and writes them, the second product reads
)
# What TensorRT runs as kernels of their own; all else it does in the kernel before or after.
_NORMS = ("InstanceNormalization", "LayerNormalization", "RMSNormalization", "GroupNormalization", "Softmax")
_KERNELS = (*PRODUCTS, *_NORMS, "Resize", "ReduceMean", "ReduceSum", "ReduceMax", "Concat", "Gather")


def pieces(work: GraphWork, engine: str) -> list[Piece]:
    """The nodes that an engine (a table of ``targets/_rates.toml``) runs, as plain numbers."""
    fused = engine == "tensorrt"
    return [_piece(node, engine) for node in work.nodes if not fused or node.operator in _KERNELS]


def _piece(node: NodeWork, engine: str) -> Piece:
    format = node.format
    if engine == "onnxruntime" and format == "int8" and node.operator == "Conv" and not node.quantized_output:
        format = "float32"  # its kernel is int8 from end to end or not at all (optimize/placements/onnxruntime_cpu.toml)
    scores = 0 if engine == "tensorrt" else _ATTENTION_PASSES * node.scratch_bytes
    return Piece(node.operations, format, node.weight_bytes, node.read_bytes + node.written_bytes + scores)


def floats(work: GraphWork) -> str:
    """The widest float format that its products compute in; empty where there is none."""
    found = {node.format for node in work.nodes}
    return next((name for name in ("float32", *_HALF) if name in found), "")


def narrowed(work: GraphWork, format: str) -> GraphWork:
    """The work as it would be in another format: float32 in half of the bytes as float16 or bfloat16; in int8 the weights of products as
    codes, which products run in, with attention and all between products left in float."""
    width = {"float32": 4, "float16": 2, "bfloat16": 2}.get(floats(work), 4)
    if format in _HALF:
        return _scaled(work, 2 / width, format)
    nodes = tuple(_in_codes(node, width) for node in work.nodes)
    saved = sum(old.weight_bytes - new.weight_bytes for old, new in zip(work.nodes, nodes, strict=True))
    return GraphWork(max(0, work.weight_bytes - saved), work.peak_bytes, nodes)


def _scaled(work: GraphWork, by: float, format: str) -> GraphWork:
    nodes = tuple(
        replace(
            node,
            format=format if node.format in ("float32", *_HALF) else node.format,
            read_bytes=round(node.read_bytes * by),
            written_bytes=round(node.written_bytes * by),
            weight_bytes=round(node.weight_bytes * by),
            scratch_bytes=round(node.scratch_bytes * by),
        )
        for node in work.nodes
    )
    return GraphWork(round(work.weight_bytes * by), round(work.peak_bytes * by), nodes)


def _in_codes(node: NodeWork, width: int) -> NodeWork:
    if node.operator not in PRODUCTS or not node.weight_bytes or node.format not in ("float32", *_HALF):
        return node
    return replace(node, format="int8", weight_bytes=node.weight_bytes // width, read_bytes=node.read_bytes // width, quantized_output=True)
