"""What one call of a graph takes, from its ONNX file alone: operations, bytes moved, weights, and activations at their peak.

Nothing is built or loaded. Sizes follow from those of the named axes (``shapes``); then each value lives from the node that
makes it to the last that reads it, in the order of the file:

1. What depends on no input is folded, as every engine does when it loads: it is a weight, of the size that is left of it.
2. A view (``Reshape``, ``Squeeze``, ...) is the memory of what it views.
3. Codes that go into products through ``DequantizeLinear`` stay codes, and a product that is quantized at once never is a float:
   engines run the three nodes as one. Where a product's operands are both codes, its format is theirs.
4. Attention keeps its scores, unless the engine's kernel never writes them (``scores=False``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from edgediffusion.bundle import axis_size
from edgediffusion.errors import EngineError
from edgediffusion.runtimes.onnx_nodes import Declared, Node, OnnxGraph, read_nodes
from edgediffusion.runtimes.products import PRODUCTS, operations
from edgediffusion.runtimes.shapes import Value, attention_sizes, infer

_VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Dropout")
_CARRY = (*_VIEWS, "Transpose")  # what leaves codes what they are
_CODES = {"uint8": "int8", "int8": "int8", "int4": "int4", "fp8": "fp8", "fp4": "fp4"}
_WIDER = ("int8", "fp8", "int4", "fp4")  # of two formats, a product runs in the one that comes first


@dataclass(frozen=True)
class NodeWork:
    """One node that computes: views, and what is folded or done within another node, are none.

    ``operations`` are those of a product, a multiplication and an addition being two; other nodes are counted by the bytes they
    move alone. ``format`` is what a product computes in. ``scratch_bytes`` are there while it runs.
    """

    name: str
    operator: str
    format: str
    operations: int
    read_bytes: int
    written_bytes: int
    weight_bytes: int
    scratch_bytes: int = 0
    quantized_output: bool = False


@dataclass(frozen=True)
class GraphWork:
    """``weight_bytes`` is what stays in memory of the constants, each once; ``peak_bytes`` the most of everything else at a time,
    inputs and outputs with it."""

    weight_bytes: int
    peak_bytes: int
    nodes: tuple[NodeWork, ...]

    @property
    def operations(self) -> int:
        return sum(node.operations for node in self.nodes)

    @property
    def moved_bytes(self) -> int:
        return sum(node.read_bytes + node.written_bytes + node.weight_bytes for node in self.nodes)


def graph_work(file: Path, axes: Mapping[str, int], *, scores: bool = True) -> GraphWork:
    """Read an ONNX file and add up what a call of it takes with the named axes at these sizes (see ``sizes.usual_sizes``).

    ``scores=False`` is for engines whose attention never writes its scores.

    Raises:
        EngineError: the file is missing or no ONNX file, an axis has no size, or a node's sizes cannot be told.
    """
    graph = read_nodes(file)
    where = f"{file.parent.name}/{file.name}"
    return _Reader(graph, _values(graph, axes, where), scores=scores).work()


def _values(graph: OnnxGraph, axes: Mapping[str, int], where: str) -> dict[str, Value]:
    """Every value of the graph, with sizes that are numbers."""
    found = {name: Value(t.dtype, t.shape, t.data, constant=True) for name, t in graph.stored.items()}
    for name, declared in graph.inputs.items():
        sizes = _sizes(declared, axes)
        if sizes is None:
            raise EngineError(
                f"The input '{name}' of '{where}' has axes of unknown size", got=str(declared.shape), allowed=", ".join(axes) or "none"
            )
        found[name] = Value(declared.dtype, sizes)
    for node in graph.nodes:
        for name, value in zip(node.outputs, _made(node, found, graph, axes, where), strict=False):  # optional outputs may be left out
            if name:
                found[name] = value
    return found


def _made(node: Node, values: Mapping[str, Value], graph: OnnxGraph, axes: Mapping[str, int], where: str) -> list[Value]:
    given = [values[name] if name else None for name in node.inputs]
    problem = "no rule for this operator"
    try:
        made = infer(node, given)
    except (ValueError, IndexError, KeyError, TypeError) as error:
        made, problem = None, str(error)
    if made is None:
        declared = [graph.declared.get(name) for name in node.outputs]
        shapes = [_sizes(d, axes) if d else None for d in declared]
        made = [Value(d.dtype, s) for d, s in zip(declared, shapes, strict=True) if d and s is not None]
        if len(made) != len(node.outputs):
            raise EngineError(
                f"What the node '{node.name or node.outputs[0]}' ({node.operator}) of '{where}' makes has no known size", got=problem
            )
    return made


def _sizes(declared: Declared, axes: Mapping[str, int]) -> tuple[int, ...] | None:
    if declared.shape is None:
        return None
    sizes = [size if isinstance(size, int) else axis_size(size, axes) for size in declared.shape]
    return None if None in sizes else tuple(size for size in sizes if size is not None)


class _Reader:
    """Walks the nodes of one graph; ``values`` has their sizes."""

    def __init__(self, graph: OnnxGraph, values: Mapping[str, Value], *, scores: bool):
        self._graph, self._values, self._scores = graph, values, scores
        self._readers: dict[str, list[Node]] = {}
        for node in graph.nodes:
            for name in node.inputs:
                self._readers.setdefault(name, []).append(node)
        self._makers = {output: node for node in graph.nodes for output in node.outputs if output}
        self._codes: dict[str, str] = {}  # of a value that is read from codes: their format
        self._root: dict[str, str] = {}  # the value whose memory a value is in
        self._bytes: dict[str, int] = {}  # of each root
        self._weights: dict[str, int] = {}  # of those roots that are constant and read

    def work(self) -> GraphWork:
        for name in (*self._graph.stored, *self._graph.inputs):
            self._place(name, name, self._values[name].bytes)
        nodes = []
        for node in self._graph.nodes:
            work = self._node(node)
            if work is not None:
                nodes.append((node, work))
        return GraphWork(sum(self._weights.values()), self._peak(nodes), tuple(work for _, work in nodes))

    def _place(self, name: str, root: str, size: int) -> None:
        self._root[name] = root
        self._bytes[root] = size

    def _node(self, node: Node) -> NodeWork | None:
        """Where its outputs lie, and what it does; None where that is nothing."""
        outputs = [name for name in node.outputs if name]
        if all(self._values[name].constant or self._values[name].data is not None for name in outputs):
            self._fold(node, outputs)
            return None
        self._follow_codes(node)
        source = node.inputs[0] if node.inputs else ""
        if node.operator in _VIEWS or (node.operator == "Cast" and self._values[source].dtype == self._values[outputs[0]].dtype):
            self._root[outputs[0]] = self._root[source]
            return None
        if node.operator == "DequantizeLinear" and self._stays_codes(outputs[0]):
            self._root[outputs[0]] = self._root[source]
            return None
        for name in outputs:
            self._place(name, name, self._values[name].bytes)
        at_once = node.operator in PRODUCTS and self._quantized_at_once(node)
        if at_once:
            self._root[outputs[0]] = codes = self._readers[outputs[0]][0].outputs[0]
            self._bytes[codes] = self._values[codes].bytes
        elif node.operator == "QuantizeLinear" and self._root.get(source) == outputs[0]:
            return None  # its product wrote the codes
        return self._counted(node, outputs, quantized=at_once)

    def _fold(self, node: Node, outputs: list[str]) -> None:
        """A constant node: it keeps the codes it reads from, if it does, and else what it makes."""
        self._follow_codes(node)
        for name in outputs:
            source = node.inputs[0] if node.inputs else ""
            if name in self._codes:
                self._root[name] = self._root[source]
            else:
                self._place(name, name, self._values[name].bytes)

    def _follow_codes(self, node: Node) -> None:
        source = node.inputs[0] if node.inputs else ""
        if node.operator == "DequantizeLinear":
            self._codes[node.outputs[0]] = _CODES.get(self._values[source].dtype, "")
        elif node.operator in _CARRY and source in self._codes:
            self._codes[node.outputs[0]] = self._codes[source]

    def _stays_codes(self, name: str) -> bool:
        """Whether only products read it, each with codes for its other operand."""
        readers = self._readers.get(name, [])
        return bool(readers) and all(
            self._stays_codes(r.outputs[0]) if r.operator in _CARRY else r.operator in PRODUCTS and self._of_codes(r, name) for r in readers
        )

    def _of_codes(self, product: Node, name: str) -> bool:
        others = [other for other in product.inputs[:2] if other != name]
        return all(self._from_codes(other) for other in others)

    def _from_codes(self, name: str) -> bool:
        maker = self._makers.get(name)
        while maker is not None and maker.operator in _CARRY:
            maker = self._makers.get(maker.inputs[0])
        return maker is not None and maker.operator == "DequantizeLinear"

    def _quantized_at_once(self, node: Node) -> bool:
        readers = self._readers.get(node.outputs[0], [])
        return self._format(node) in _WIDER and len(readers) == 1 and readers[0].operator == "QuantizeLinear"

    def _format(self, node: Node) -> str:
        if node.operator in ("MatMulInteger", "ConvInteger"):
            return "int8"
        operands = [self._codes.get(name, "") for name in node.inputs[:2]]
        if all(operands) and node.operator != "Attention":
            return min(operands, key=_WIDER.index)
        return self._values[node.outputs[0]].dtype

    def _counted(self, node: Node, outputs: list[str], *, quantized: bool) -> NodeWork:
        read: dict[str, int] = {}
        weights: dict[str, int] = {}
        for name in filter(None, node.inputs):
            root, value = self._root[name], self._values[name]
            if value.data is None or value.constant:
                (weights if value.constant else read)[root] = self._bytes[root]
        self._weights |= weights
        if node.operator in ("Gather", "GatherND"):  # it reads what it takes, not the table
            weights = dict.fromkeys(weights, self._values[outputs[0]].bytes)
        product = node.operator in PRODUCTS
        return NodeWork(
            name=node.name or outputs[0],
            operator=node.operator,
            format=self._format(node) if product else "",
            operations=operations(node, self._values) if product else 0,
            read_bytes=sum(read.values()),
            written_bytes=sum(self._bytes[self._root[name]] for name in outputs),
            weight_bytes=sum(weights.values()),
            scratch_bytes=_scores(node, self._values) if self._scores else 0,
            quantized_output=quantized,
        )

    def _peak(self, nodes: list[tuple[Node, NodeWork]]) -> int:
        """The most that is alive while one of the nodes runs; inputs and outputs of the graph are there from beginning to end."""
        held = {self._root[name] for name in (*self._graph.inputs, *self._graph.outputs)}
        left = Counter(root for node, _ in nodes for root in self._roots(node.inputs))
        fixed = sum(self._bytes[root] for root in held if root not in self._weights)
        alive: dict[str, int] = {}
        peak = fixed
        for node, work in nodes:
            for root in self._roots(node.outputs) - held:
                alive[root] = self._bytes[root]
            peak = max(peak, fixed + sum(alive.values()) + work.scratch_bytes)
            for root in self._roots(node.inputs):
                left[root] -= 1
            for root in self._roots((*node.inputs, *node.outputs)):
                if not left[root]:
                    alive.pop(root, None)
        return peak

    def _roots(self, names: tuple[str, ...]) -> set[str]:
        found = {self._root[name] for name in names if name and self._values[name].data is None}
        return {root for root in found if root not in self._graph.stored and not self._values[root].constant}


def _scores(node: Node, values: Mapping[str, Value]) -> int:
    if node.operator != "Attention":
        return 0
    rows, heads, queries, keys, _, _ = attention_sizes(node, [values[name] if name else None for name in node.inputs])
    return replace(values[node.outputs[0]], shape=(rows, heads, queries, keys)).bytes
