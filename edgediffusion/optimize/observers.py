"""Observers in the graph: what every layer of an ONNX graph reads and gives, as one more output that ONNX Runtime computes.

Of a tensor x that a layer reads or gives, by channel:

    x ─ (Cast to float32) ─┬─ ReduceMin ─────────────┐
                           ├─ ReduceMax ─────────────┼─ Concat ─ edgediffusion.observed
                           └─ Mul(x, x) ─ ReduceMean ┘

over all axes but that of the channels, which is axis 1 of what a convolution sees and the last one for a matrix product. So a few
numbers leave the engine, never a tensor, and no torch is needed. The output of a matrix product is taken with its bias, as torch's
layers have it: behind the Add of a constant [out], if that follows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgediffusion.bundle import Bundle, Component
from edgediffusion.errors import ArgumentError
from edgediffusion.files import link_or_copy
from edgediffusion.optimize.observed import Channels, Observed, not_finite
from edgediffusion.optimize.recipe import Recipe
from edgediffusion.registry import find, require
from edgediffusion.runtimes.graph import Graph

OUTPUT = "edgediffusion.observed"
_AXES_ARE_INPUTS = 18  # the opset from which reductions take their axes as an input
_LOW, _HIGH, _MEAN_SQUARE = range(3)


def observe_graph(
    bundle: Bundle,
    component: Component,
    items: Sequence[tuple[int, Mapping[str, np.ndarray]]],
    *,
    recipe: Recipe | None = None,
    folder: Path | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Observed]:
    """Run a component's graph with every item, a sampling step and its inputs by name, and watch its layers.

    They are those that ``recipe`` quantizes, split and rotated where it asks for that. A copy of the graph, its weights linked,
    lies in a temporary folder within ``folder`` meanwhile. Weights are read when they are asked for, one at a time.

    Raises:
        ArgumentError: a layer gave a value that is no finite number (the message names the layer and the step), or there is no layer.
        EngineError: ONNX Runtime cannot run the graph. MissingExtra: onnx-ir is not installed.
    """
    require("onnx_ir", extra="optimize", purpose="Observing the layers of a graph")
    file = bundle.path / component.model
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".observers-", dir=folder) as temporary:
        watched = _write_graph(file, Path(temporary), recipe)
        graph = Graph(component, find("runtimes.engines", "onnxruntime").open_session(Path(temporary) / file.name))
        found = _layers(file, watched, recipe)
        for done, (step, feeds) in enumerate(items):
            _add(found, watched, step, _run(graph, feeds))
            progress(done + 1)
    return found


@dataclass(frozen=True)
class _Watched:
    """A layer of the graph, and which of the observed tensors are its input and output."""

    name: str
    input: slice  # in the values of the output, three for each channel
    output: slice


def _is_changed(recipe: Recipe | None) -> bool:
    return recipe is not None and bool(recipe.split or recipe.rotate)


def _write_graph(file: Path, folder: Path, recipe: Recipe | None = None) -> list[_Watched]:
    """Write the graph with the statistics as its one output, and its weights beside it."""
    import onnx_ir as ir

    from edgediffusion.optimize.graph_file import store_weights
    from edgediffusion.optimize.graph_layers import find_layers

    model = _prepared(file, recipe) if _is_changed(recipe) else ir.load(file)
    layers = find_layers(model.graph)
    if not layers:
        raise ArgumentError(f"The graph '{file}' has no convolution or matrix product with a weight: there is nothing to calibrate")
    observers = _Observers(model.graph, model.opset_imports.get("", 0))
    watched = [_Watched(layer.name, observers.input(layer), observers.output(layer)) for layer in layers]
    observers.finish()
    if _is_changed(recipe):  # there are weights that no file has
        store_weights(model, folder)
        ir.save(model, folder / file.name)
        return watched
    ir.save(model, folder / file.name)
    tensors = [value.const_value for value in model.graph.initializers.values()]
    for location in {str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}:
        link_or_copy(file.parent / location, folder / location)
    return watched


@dataclass
class _Observers:
    """Adds the nodes to one graph; a tensor that several layers see is observed once.

    A mean of squares, not ReduceSumSquare: of large tensors ONNX Runtime's CPU kernel for that takes fifty times as long.
    """

    graph: Any
    opset: int
    places: dict[tuple[Any, int], slice] = field(default_factory=dict)
    statistics: list[Any] = field(default_factory=list)
    nodes: list[list[Any]] = field(default_factory=list)  # of each tensor
    size: int = 0

    def input(self, layer: Any) -> slice:
        return self._observe(layer.node.inputs[0], layer, layer.channels[0])

    def output(self, layer: Any) -> slice:
        return self._observe(layer.given, layer, layer.channels[1])

    def finish(self) -> None:
        """Make the statistics the graph's output, in the place of its own."""
        import onnx_ir as ir

        # ONNX Runtime runs what the last of Concat's inputs needs first, and keeps until the end what is not reduced yet. In this
        # order that is next to nothing; in the layers' own it was all tensors of the network.
        for nodes in reversed(self.nodes):
            self.graph.extend(nodes)
        node = ir.node("Concat", self.statistics, {"axis": 0})
        node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = OUTPUT, ir.DataType.FLOAT, ir.Shape([self.size])
        self.graph.append(node)
        self.graph.outputs.clear()
        self.graph.outputs.append(node.outputs[0])

    def _observe(self, value: Any, layer: Any, channels: int) -> slice:
        import onnx_ir as ir

        if (value, layer.axis) not in self.places:
            self.nodes.append([])
            x = value if layer.dtype == ir.DataType.FLOAT else self._node("Cast", [value], to=ir.DataType.FLOAT)
            axes = [0, 2, 3]
            if layer.axis == -1:  # of whatever rank
                x, axes = self._node("Reshape", [x, self._constant([-1, channels])]), [0]
            square = self._node("Mul", [x, x])
            for kind, source in (("ReduceMin", x), ("ReduceMax", x), ("ReduceMean", square)):
                self.statistics.append(self._reduced(kind, source, axes))
            self.places[value, layer.axis] = slice(self.size, self.size + 3 * channels)
            self.size += 3 * channels
        return self.places[value, layer.axis]

    def _reduced(self, kind: str, value: Any, axes: list[int]) -> Any:
        if self.opset < _AXES_ARE_INPUTS:
            return self._node(kind, [value], axes=axes, keepdims=0)
        return self._node(kind, [value, self._constant(axes)], keepdims=0)

    def _node(self, kind: str, inputs: list[Any], **attributes: Any) -> Any:
        import onnx_ir as ir

        node = ir.node(kind, inputs, attributes)
        node.outputs[0].name = f"{OUTPUT}.{sum(map(len, self.nodes))}"
        self.nodes[-1].append(node)
        return node.outputs[0]

    def _constant(self, numbers: list[int]) -> Any:
        import onnx_ir as ir

        name = f"{OUTPUT}.constant.{'.'.join(map(str, numbers))}"
        if name not in self.graph.initializers:
            tensor = ir.tensor(np.array(numbers, np.int64), name=name)
            value = ir.Value(name=name, const_value=tensor, shape=ir.Shape([len(numbers)]), type=ir.TensorType(tensor.dtype))
            self.graph.register_initializer(value)
        return self.graph.initializers[name]


def _prepared(file: Path, recipe: Recipe | None) -> Any:
    from edgediffusion.optimize.graph_file import load_graph
    from edgediffusion.optimize.quantize import prepared_graph

    return load_graph(file) if recipe is None else prepared_graph(file, recipe)


def _layers(file: Path, watched: Sequence[_Watched], recipe: Recipe | None) -> dict[str, Observed]:
    from edgediffusion.optimize.graph_layers import find_layers

    found: dict[str, Observed] = {}
    for layer in find_layers(_prepared(file, recipe).graph):
        read, given = map(Channels.none, layer.channels)
        found.setdefault(layer.name, Observed(layer.read_weight, layer.groups, read, given))
    of_tensor: dict[int, dict[str, None]] = {}
    for place in watched:
        of_tensor.setdefault(place.input.start, {})[place.name] = None
    for place in watched:
        found[place.name].readers = tuple(of_tensor[place.input.start])
    return found


def _run(graph: Graph, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    binding = graph.bind({name: array.shape for name, array in feeds.items()})
    for name, buffer in binding.inputs.items():
        np.copyto(buffer, feeds[name])
    binding.run()
    return binding.outputs[OUTPUT]


def _add(found: Mapping[str, Observed], watched: Sequence[_Watched], step: int, values: np.ndarray) -> None:
    for place in watched:
        layer = found[place.name]
        given = values[place.output].reshape(3, -1)
        # Of the three, only sums are sure to carry a NaN on: the order of comparisons is the engine's own.
        if not np.isfinite(given).all():
            raise not_finite(place.name, step)
        read = values[place.input].reshape(3, -1)
        for channels, seen in ((layer.input, read), (layer.output, given)):
            # All items have one size, so that the mean of their means is that of all values.
            channels.add(seen[_LOW], seen[_HIGH], seen[_MEAN_SQUARE].astype(np.float64), 1)
        layer.saw(step, np.maximum(np.abs(read[_LOW]), np.abs(read[_HIGH])))
