"""What each layer's nodes take in a step, float and quantized, by the engine's own profile; and whole steps side by side.

Nodes are given names by which the profile's can be told: a mark with the numbers of the layers that a node serves, such as
``layer<3,4>`` for a QuantizeLinear that two layers read. To a layer belong its Conv, MatMul or Gemm, the nodes that the
quantized graph has more than the float one before its inputs, those behind its output where that is quantized, and an
activation function that engines make part of a convolution. A node
that serves several layers counts for each in equal parts. The engine adds nodes of its own, which change layouts: they are
counted with the layer whose node ran nearest to them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgediffusion.optimize.graph_layers import Layer, find_layers
from edgediffusion.optimize.quantize import prepared_graph, quantize_model
from edgediffusion.optimize.recipe import Placement, Recipe
from edgediffusion.optimize.state import LayerState
from edgediffusion.runtimes.engines import Binding, NodeTime

_MARK = re.compile(r"layer<([\d,]+)>")
_ADDED_BY_ENGINE = re.compile(r"(_token_\d+|/.*)$")
_FUSED = ("Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "HardSigmoid")
_LAYOUT = ("Transpose", "ReorderInput", "ReorderOutput", "QuantizeLinear", "DequantizeLinear", "Cast")
_BLOCK = 5  # timed calls of one graph before the next one's turn
_CLOCK_MS = 1e-3  # profiles count microseconds


@dataclass(frozen=True)
class MarkedGraph:
    """``quantized`` are the layers that are, ``declined`` those that are not with the reason, ``quantized_outputs`` those that
    quantize what they give too."""

    model: ir.Model
    layers: tuple[str, ...]
    quantized: frozenset[str] = frozenset()
    declined: Mapping[str, str] | None = None
    quantized_outputs: frozenset[str] = frozenset()

    def times(self, nodes: Sequence[NodeTime]) -> dict[str, np.ndarray]:
        """Milliseconds of each layer in each run, from a profile of this graph; layers that it does not show are left out."""
        given = {v.name: n for n, name in enumerate(self.layers) for v in self.model.graph.outputs if v.name == _given(self, n)}
        own = {node.name for node in self.model.graph}
        marks = [_layers_of(node.name, given) for node in nodes]
        marked = np.flatnonzero([bool(mark) for mark in marks])
        found: dict[str, np.ndarray] = {}
        for at, node in enumerate(nodes):
            numbers = marks[at]
            if not numbers and node.operator in _LAYOUT and _ADDED_BY_ENGINE.sub("", node.name or "") not in own and len(marked):
                distance = np.abs(marked - at)
                numbers = marks[int(marked[len(marked) - 1 - int(np.argmin(distance[::-1]))])]  # of two as near the later one
            for number in numbers:
                name = self.layers[number]
                found[name] = found.get(name, 0.0) + np.asarray(node.times_ms) / len(numbers)
        return found


def marked_float(file: Path, recipe: Recipe) -> MarkedGraph:
    """The float graph, its layers numbered: those that ``recipe`` quantizes, split where it asks for that."""
    model = prepared_graph(file, recipe)
    layers = find_layers(model.graph)
    for number, layer in enumerate(layers):
        for node in (layer.node, *_activation(layer.node)):
            _mark(node, [number], model.graph)
    return MarkedGraph(model, tuple(layer.name for layer in layers))


def marked_quantized(file: Path, states: Mapping[str, LayerState], recipe: Recipe, placement: Placement) -> MarkedGraph:
    """The graph as ``quantize`` makes it, its layers numbered as in the float one."""
    model = prepared_graph(file, recipe)
    before = {output.name for node in model.graph for output in node.outputs}
    layers = find_layers(model.graph)
    report = quantize_model(model, states, recipe, placement)
    quantized = frozenset(report.quantized)
    added = {node for node in model.graph if not {output.name for output in node.outputs} & before}
    outputs = set(model.graph.outputs)
    giving = [
        n
        for n, layer in enumerate(layers)
        if layer.name in quantized
        and layer.node.op_type in placement.outputs
        and recipe.formats(layer.name)[1] == "int8"
        and layer.node.outputs[0] not in outputs
    ]
    for node, numbers in _serves(layers, giving, added).items():
        _mark(node, numbers, model.graph)
    for number, layer in enumerate(layers):
        given = [layer.node, *(_behind(layer.node, added) if number in giving else ())][-1]
        for node in (layer.node, *_activation(given)):
            _mark(node, [number], model.graph)
    names = tuple(layer.name for layer in layers)
    return MarkedGraph(model, names, quantized, dict(report.declined), frozenset(names[n] for n in giving))


def _serves(layers: Sequence[Layer], giving: Collection[int], added: set[ir.Node]) -> dict[ir.Node, list[int]]:
    """Which layers each added node serves."""
    serves = {node: [number] for number in giving for node in _behind(layers[number].node, added)}
    rest = added - set(serves)
    for number, layer in enumerate(layers):
        for node in _above(layer.node, rest):
            serves.setdefault(node, []).append(number)
    return serves


def _behind(node: ir.Node, added: set[ir.Node]) -> list[ir.Node]:
    """The Q and DQ of the node's output."""
    found: list[ir.Node] = []
    for kind in ("QuantizeLinear", "DequantizeLinear"):
        users = {use.node for use in (found[-1] if found else node).outputs[0].uses()}
        found.extend(user for user in users if user in added and user.op_type == kind)
    return found


def _activation(node: ir.Node) -> list[ir.Node]:
    """The activation function that alone reads what the node gives, if the engine may make it part of a convolution."""
    users = list(node.outputs[0].uses())
    return [users[0].node] if len(users) == 1 and users[0].node.op_type in _FUSED else []


def _above(node: ir.Node, among: set[ir.Node]) -> Iterable[ir.Node]:
    """Nodes of ``among`` that ``node`` reads, directly or through others of them."""
    seen: dict[ir.Node, None] = {}
    waiting = [node]
    while waiting:
        for value in waiting.pop().inputs:
            producer = None if value is None else value.producer()
            if producer is not None and producer in among and producer not in seen:
                seen[producer] = None
                waiting.append(producer)
    return seen


def _mark(node: ir.Node, numbers: Sequence[int], graph: ir.Graph) -> None:
    """Name the node, and its outputs: engines call some of their nodes after what these give."""
    mark = f"layer<{','.join(map(str, numbers))}>"
    node.name = f"{mark}.{node.op_type}.{node.outputs[0].name}"
    for output in node.outputs:
        if not any(output is given for given in graph.outputs):
            output.name = f"{mark}.{output.name}"


def _given(graph: MarkedGraph, number: int) -> str | None:
    """The graph's output that the layer gives: a name that could not be changed."""
    mark = f"layer<{number}>"
    for value in graph.model.graph.outputs:
        producer = value.producer()
        if producer is not None and (producer.name or "").startswith(mark):
            return value.name
    return None


def _layers_of(name: str, given: Mapping[str | None, int]) -> tuple[int, ...]:
    if match := _MARK.search(name):
        return tuple(int(number) for number in match[1].split(","))
    return next(((number,) for output, number in given.items() if output and name.startswith(output)), ())


@dataclass(frozen=True)
class Measured:
    """A median and its standard error."""

    value: float
    noise: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Measured:
        """1.2533 s / sqrt(n) for a median of n, with s = 1.4826 median |v - median|: robust, and exact for a normal law."""
        v = np.asarray(values, np.float64)
        spread = 1.4826 * float(np.median(np.abs(v - np.median(v))))
        return cls(float(np.median(v)), 1.2533 * spread / len(v) ** 0.5)


def difference_noise(float_ms: np.ndarray, quantized_ms: np.ndarray) -> float:
    """Standard error of the median difference of runs that took turns; not less than the clock's own step."""
    return max(Measured.of(quantized_ms - float_ms).noise, _CLOCK_MS)


def time_in_turn(
    bindings: Sequence[Binding], runs: int, *, warmup: int = 3, progress: Callable[[float], None] = lambda part: None
) -> np.ndarray:
    """Milliseconds of ``runs`` calls of each binding, [bindings, runs], in blocks; the first call of a block is not timed.

    The worker threads of an engine spin for a while after a call, on cores that the next one needs.
    """
    times = np.zeros((len(bindings), runs))
    for binding in bindings:
        for _ in range(warmup):
            binding.run()
    for start in range(0, runs, _BLOCK):
        for at, binding in enumerate(bindings):
            binding.run()
            for run in range(start, min(start + _BLOCK, runs)):
                started = time.perf_counter()
                binding.run()
                times[at, run] = (time.perf_counter() - started) * 1e3
        progress(min(start + _BLOCK, runs) / runs)
    return times


def ratio(times: np.ndarray, base: np.ndarray) -> Measured:
    """Of two rows of ``time_in_turn``: of the fastest calls of each block, since what disturbs a call only makes it longer."""
    blocks = range(0, len(times), _BLOCK)
    return Measured.of([float(times[b : b + _BLOCK].min() / base[b : b + _BLOCK].min()) for b in blocks])
