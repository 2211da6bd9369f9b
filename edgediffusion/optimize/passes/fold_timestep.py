"""Put a table in place of the nodes that depend on the time step alone: TFMQ-DM's deployment (2311.16503, section 4.1).

    timestep ─ Expand ─ Sin, Cos ─ Gemm ─ … ─┬─ Gemm ─ Add(x)        becomes
                                             └─ Gemm ─ Add(y)

    timestep ─ Sub(known) ─ Abs ─ ArgMin ─ Gather(table) ─ Split ─┬─ Add(x)
                                                                  └─ Add(y)

A sampler calls a network at a few time steps that are known beforehand. What is computed from the time step alone, and
from the number of rows, which all have the same one, is computed for each of them and kept; the nodes and weights that
served nothing else go. Every value of a graph is one of four kinds:

* fixed: made of initializers alone;
* rows: made of the batch's size too;
* time: made of the time step, and of the former two;
* open: everything else.

The block is all nodes that make time values, and its frontier the time values that open nodes read. With a condition in
the embedding (a guidance scale, a pooled text) the frontier lies before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

TIMESTEP = "timestep"
_BROADCASTING = ("Add", "Sub", "Mul", "Div")
_RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli")


@dataclass(frozen=True)
class TimeBlock:
    """Nodes that depend on the time step alone, in the graph's order, and the values of theirs that other nodes read.

    ``joined`` are the inputs of the graph that meet such a value before the network's own input does: what is made of both
    cannot be computed beforehand.
    """

    nodes: tuple[ir.Node, ...]
    frontier: tuple[ir.Value, ...]
    joined: tuple[str, ...]


def time_block(graph: ir.Graph) -> TimeBlock:
    """The largest block of a graph that has the input ``timestep``, as the file's docstring defines it."""
    kinds = _kinds(graph)
    nodes = tuple(node for node in graph if kinds[node.outputs[0]] == "time")
    outer = {value: [use.node for use in value.uses() if kinds[use.node.outputs[0]] == "open"] for n in nodes for value in n.outputs}
    frontier = tuple(value for value, users in outer.items() if users)
    return TimeBlock(nodes, frontier, _joined(graph, {node for users in outer.values() for node in users}))


def block_model(model: ir.Model, block: TimeBlock) -> ir.Model:
    """A model of its own that computes the frontier; of the inputs it has those that the block needs, if only for their shape."""
    names = [str(value.name) for value in block.frontier]
    graph = ir.convenience.extract(model.graph, [str(value.name) for value in model.graph.inputs], names)
    for value in list(graph.inputs):
        if not value.uses():
            graph.inputs.remove(value)
    return ir.Model(graph, ir_version=model.ir_version)


def fold_timestep(model: ir.Model, block: TimeBlock, timesteps: np.ndarray, rows: Mapping[str, np.ndarray]) -> None:
    """Replace the block of ``model``, in place.

    ``timesteps`` is [steps], in the type of the input; ``rows`` has for each value of the frontier, by name, an array
    [steps, ...]: what every row of the value is at each of them. At a time step that is not known the nearest counts; it is
    for the caller to refuse it.
    """
    graph, inside = model.graph, set(block.nodes)
    new = _Nodes(graph)
    index = new.index(next(value for value in graph.inputs if value.name == TIMESTEP), timesteps)
    for group in _groups(block.frontier, rows):
        for value, row in zip(group, new.look_up(group, rows, index), strict=True):
            for use in [use for use in value.uses() if use.node not in inside]:
                use.node.replace_input_with(use.idx, row if _broadcasts(use.node, use.idx, value) else new.every_row(row))
    graph.insert_before(graph[0], new.nodes)
    RemoveUnusedNodesPass()(model)


def _kinds(graph: ir.Graph) -> dict[ir.Value, str]:
    kinds: dict[ir.Value, str] = dict.fromkeys(graph.initializers.values(), "fixed")
    kinds |= {value: "time" if value.name == TIMESTEP else "open" for value in graph.inputs}
    for node in graph:
        kinds |= dict.fromkeys(node.outputs, _kind(node, {kinds[value] for value in node.inputs if value is not None}))
    return kinds


def _kind(node: ir.Node, read: set[str]) -> str:
    if node.op_type == "Shape":
        return "rows" if _is_batch_size(node) else "open"
    if node.op_type in _RANDOM or any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        return "open"
    return next((kind for kind in ("open", "time", "rows") if kind in read), "fixed")


def _is_batch_size(node: ir.Node) -> bool:
    start, end, source = node.attributes.get("start"), node.attributes.get("end"), node.inputs[0]
    first = end is not None and end.as_int() == 1 and (start is None or start.as_int() == 0)
    return first and source is not None and source.shape is not None and source.shape[0] == _batch(node.graph)


def _batch(graph: ir.Graph | ir.Function | None) -> object:
    """The axis that the rows of all inputs lie on; the time step has one for all rows."""
    inputs = [] if graph is None else [value for value in graph.inputs if value.name != TIMESTEP and value.shape]
    return next((value.shape[0] for value in inputs if value.shape), None)


def _joined(graph: ir.Graph, users: set[ir.Node]) -> tuple[str, ...]:
    """Inputs that reach a node which reads the frontier, where the state that is denoised does not reach it as well."""
    reached: dict[ir.Value, frozenset[str]] = {value: frozenset({str(value.name)}) for value in graph.inputs}
    found: set[str] = set()
    for node in graph:
        of = frozenset().union(*(reached.get(value, frozenset()) for value in node.inputs if value is not None))
        # A shape is no more than the batch's size or the picture's: it joins nothing.
        reached |= dict.fromkeys(node.outputs, frozenset() if node.op_type == "Shape" else of)
        if node in users and "sample" not in of:
            found |= of - {TIMESTEP}
    return tuple(sorted(found))


def _groups(frontier: Iterable[ir.Value], rows: Mapping[str, np.ndarray]) -> list[list[ir.Value]]:
    """Values that differ in their second axis only: one table serves them all."""
    groups: dict[object, list[ir.Value]] = {}
    for value in frontier:
        array = rows[str(value.name)]
        groups.setdefault((array.dtype, array.ndim, array.shape[2:]) if array.ndim > 1 else value, []).append(value)
    return list(groups.values())


def _broadcasts(node: ir.Node, at: int, value: ir.Value) -> bool:
    """Whether one row serves the node: it makes as many of it as its other operand has, or there never were more."""
    own = value.shape
    if own is not None and own[0] == 1:
        return True
    other = node.inputs[1 - at] if node.op_type in _BROADCASTING else None
    if own is None or other is None or other is value or other.shape is None:
        return False
    return len(own) == len(other.shape) and own[0] == other.shape[0]


class _Nodes:
    """New nodes, in order, which read initializers and inputs of the graph only: they go before all others."""

    def __init__(self, graph: ir.Graph):
        self.graph = graph
        self.nodes: list[ir.Node] = []
        self._repeated: dict[ir.Value, ir.Value] = {}

    def index(self, timestep: ir.Value, timesteps: np.ndarray) -> ir.Value:
        """int64 [1]: which of the known time steps it is. The nearest, as an engine may round the input to a narrower float."""
        known = self.constant(f"{TIMESTEP}.known", timesteps)
        distance = self.add("Abs", [self.add("Sub", [known, timestep], f"{TIMESTEP}.signed")], f"{TIMESTEP}.distance")
        if timesteps.dtype != np.float32:  # ONNX Runtime has no ArgMin of other types that a time step may have
            distance = self.add("Cast", [distance], f"{TIMESTEP}.float", to=int(ir.DataType.FLOAT))
        return self.add("ArgMin", [distance], f"{TIMESTEP}.index", axis=0, keepdims=1)

    def look_up(self, group: list[ir.Value], rows: Mapping[str, np.ndarray], index: ir.Value) -> list[ir.Value]:
        """[1, ...] of each value of the group at the time step of that index."""
        arrays = [rows[str(value.name)] for value in group]
        name = f"{group[0].name}.folded"
        table = self.constant(f"{name}.table", arrays[0] if len(group) == 1 else np.concatenate(arrays, axis=1))
        row = self.add("Gather", [table, index], name if len(group) == 1 else f"{name}.row", axis=0)
        found = [row] if len(group) == 1 else self._split(row, [array.shape[1] for array in arrays], group)
        for value, array in zip(found, arrays, strict=True):
            value.shape, value.type = ir.Shape([1, *array.shape[1:]]), table.type
        return found

    def every_row(self, row: ir.Value) -> ir.Value:
        """As many rows as the batch has, for a node that does not repeat one by itself."""
        if row not in self._repeated:
            assert row.shape is not None
            source = next(v for v in self.graph.inputs if v.name != TIMESTEP and v.shape is not None and len(v.shape) > 0)
            size = self.add("Shape", [source], f"{row.name}.batch", start=0, end=1)
            ones = self.constant(f"{row.name}.ones", np.ones(len(row.shape) - 1, np.int64))
            shape = self.add("Concat", [size, ones], f"{row.name}.shape", axis=0)
            self._repeated[row] = self.add("Expand", [row, shape], f"{row.name}.rows")
        return self._repeated[row]

    def _split(self, row: ir.Value, sizes: list[int], group: list[ir.Value]) -> list[ir.Value]:
        parts = self.constant(f"{group[0].name}.folded.sizes", np.array(sizes, np.int64))
        node = ir.node("Split", [row, parts], attributes={"axis": 1}, num_outputs=len(group))
        for value, output in zip(group, node.outputs, strict=True):
            output.name = f"{value.name}.folded"
        self.nodes.append(node)
        return list(node.outputs)

    def add(self, kind: str, inputs: list[ir.Value], name: str, **attributes: int) -> ir.Value:
        node = ir.node(kind, inputs, attributes=attributes)
        node.outputs[0].name = name
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        self.graph.register_initializer(value)
        return value
