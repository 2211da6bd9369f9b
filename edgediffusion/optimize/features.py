"""Features of a trajectory: what one tensor inside the denoiser is at every sampling step, in one pass of one batch.

The tensor is the input of a module, found in the graph by what flows where and by the names of parameters, so that no
family needs to be known:

1. The first node that reads both something that depends on ``sample`` and a parameter under the module's path.
2. From there back, as long as a node has a single input that depends on ``sample`` and reads no parameter. That passes
   a normalization without weights, reshaping, and the scale and shift that come from the time step, and stops at a
   residual sum, a concatenation, a transposition or another layer. Of the tensors on that way, it is the first with as
   many axes as the last: a picture stays a picture, a sequence a sequence.

A copy of the graph with that tensor as a second output is run by ONNX Runtime in place of the denoiser.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgediffusion.bundle import Bundle, Component, TensorSpec
from edgediffusion.errors import ArgumentError, UnknownName
from edgediffusion.files import link_or_copy
from edgediffusion.optimize.calibration import Features
from edgediffusion.registry import find
from edgediffusion.runtimes.engines import NOT_SHARED, Binding, Session
from edgediffusion.runtimes.graph import open_graphs
from edgediffusion.runtimes.pipeline import Pipeline

OUTPUT = "edgediffusion.features"
_ATTENTION = "mid_block.attentions.0"
_BLOCKS = "transformer_blocks"
_SHAPES = ("Shape", "Size")  # they depend on sizes alone


@contextmanager
def tapped(bundle: Bundle, component: Component, cut: str | None, *, folder: Path | None = None) -> Iterator[Tap]:
    """A pipeline whose denoiser also gives the tensor that enters the module ``cut`` (see ``default_cut``).

    The copy of the graph lies in a temporary folder within ``folder`` and is removed with it.

    Raises:
        UnknownName: the graph has no such module. ArgumentError: nothing that depends on the picture enters it.
    """
    with tempfile.TemporaryDirectory(prefix=".features-", dir=folder) as temporary:
        path = _write_graph(bundle, component, cut, Path(temporary))
        session = find("runtimes.engines", "onnxruntime").open_session(Path(temporary) / Path(component.model).name)
        others = {graph.name: graph.session for graph in open_graphs(bundle, ("encode",), target="onnx", threads=None)}
        tap = _TappedSession(session)
        without_decoder = replace(bundle, components=tuple(c for c in bundle.components if c.name in {*others, component.name}))
        yield Tap(path, Pipeline(without_decoder, {**others, component.name: tap}), tap)


@dataclass(frozen=True)
class Tap:
    """``cut`` is the module's path; ``pipeline`` has the bundle's encoders and the denoiser with a second output."""

    cut: str
    pipeline: Pipeline
    _session: _TappedSession

    def draw(self, prompts: Sequence[str], *, progress: Callable[[str, float], None], **options: Any) -> Features:
        """The features of one batch, one trajectory for each prompt; ``options`` as for ``Pipeline.steps``.

        Raises:
            EngineError: the network's numbers are not finite.
        """
        found = []
        for step in self.pipeline.steps(prompts, **options):
            progress("features", step.index / step.total)
            found.append(_points(self._session.seen))
        progress("features", 1.0)
        return Features(self.cut, np.stack(found), progress)


def default_cut(names: Sequence[str]) -> str:
    """The module whose input a strategy looks at where nothing else is asked for, by the names of the parameters.

    1. ``mid_block.attentions.0``, the attention in the middle of a UNet: EDA-DM's choice.
    2. The middle one of ``transformer_blocks``, which is ours: there is no paper's choice for transformers.
    3. The middle one of the longest numbered list of blocks at the top.

    Raises:
        ArgumentError: there is none of them.
    """
    if any(name.startswith(f"{_ATTENTION}.") for name in names):
        return _ATTENTION
    blocks = {(m[1], int(m[2])) for name in names if (m := re.match(r"([^.]+)\.(\d+)\.", name))}
    if not blocks:
        raise ArgumentError("The network has no blocks to look into", do="Name a module with --option cut=MODULE.PATH")
    lengths = Counter(name for name, _ in blocks)
    chosen = _BLOCKS if _BLOCKS in lengths else max(sorted(lengths), key=lambda name: lengths[name])
    return f"{chosen}.{lengths[chosen] // 2}"


def parameters(graph: Any) -> list[str]:
    """Names of the initializers of an onnx-ir graph that lie in a file of weights; constants lie in the graph itself."""
    import onnx_ir as ir

    return [name for name, value in graph.initializers.items() if isinstance(value.const_value, ir.ExternalTensor)]


def tensor_entering(graph: Any, cut: str) -> Any:
    """The value of an onnx-ir graph that enters the module at path ``cut``: numbers 1 and 2 above.

    Raises:
        UnknownName: no parameter lies under that path. ArgumentError: nothing that depends on the picture enters it.
    """
    names = parameters(graph)
    if not any(name.startswith(f"{cut}.") for name in names):
        raise UnknownName("module of the network", cut, _modules(names))
    flow = _Flow(graph)
    for node in graph:
        if flow.data(node) and any(name.startswith(f"{cut}.") for name in flow.parameters(node)):
            return _enters(node, flow)
    raise ArgumentError(
        f"Nothing that depends on the picture enters the module '{cut}': it works on the time step or the prompt",
        do="Name another module with --option cut=MODULE.PATH",
    )


def _enters(node: Any, flow: _Flow) -> Any:
    way = [flow.data(node)[0]]
    while (before := way[-1].producer()) is not None and before.op_type != "Transpose":
        if len(flow.data(before)) != 1 or flow.parameters(before):
            break
        way.append(flow.data(before)[0])
    return next(value for value in reversed(way) if _rank(value) == _rank(way[0]))


def _rank(value: Any) -> int | None:
    return None if value.shape is None else len(value.shape)


class _Flow:
    """Which values of a graph depend on ``sample``, and which parameters reach a node without passing any input."""

    def __init__(self, graph: Any):
        self._data = {value for value in graph.inputs if value.name == "sample"}
        varying = set(graph.inputs)
        self._constants: dict[Any, frozenset[str]] = {graph.initializers[name]: frozenset([name]) for name in parameters(graph)}
        for node in graph:
            inputs = [value for value in node.inputs if value is not None]
            if node.op_type not in _SHAPES and any(value in self._data for value in inputs):
                self._data |= set(node.outputs)
            if any(value in varying for value in inputs):
                varying |= set(node.outputs)
            else:
                self._constants |= dict.fromkeys(node.outputs, self.parameters(node))

    def data(self, node: Any) -> list[Any]:
        """The inputs of a node that depend on ``sample``."""
        return [] if node.op_type in _SHAPES else list(dict.fromkeys(v for v in node.inputs if v in self._data))

    def parameters(self, node: Any) -> frozenset[str]:
        """Names of the parameters that a node reads, as they are or cast, transposed and the like."""
        return frozenset().union(*(self._constants.get(value, frozenset()) for value in node.inputs))


def _modules(names: Sequence[str]) -> list[str]:
    """Paths that end in a number and lie at most three deep: blocks and their layers, not each of hundreds of modules."""
    found = {".".join(parts[:depth]) for name in names for parts in [name.split(".")] for depth in range(1, min(len(parts), 5))}
    return [path for path in found if path.rsplit(".", 1)[-1].isdigit()]


def _write_graph(bundle: Bundle, component: Component, cut: str | None, folder: Path) -> str:
    """Write the denoiser with the tensor as a second output, its weights beside it; the path of the module."""
    import onnx
    import onnx_ir as ir

    file = bundle.path / component.model
    # Export leaves values without shapes where it rewrote nodes; how many axes they have is asked for below.
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.load(file, load_external_data=False)))
    path = default_cut(parameters(model.graph)) if cut is None else cut
    node = ir.node("Identity", [tensor_entering(model.graph, path)])
    source, (output,) = node.inputs[0], node.outputs
    assert source is not None
    output.name, output.type = OUTPUT, source.type
    # The sizes of its axes are found out by a run, so that only their number must be known here.
    rank = len(source.shape) if source.shape is not None else 0
    output.shape = ir.Shape([f"{OUTPUT}.{axis}" for axis in range(rank)])
    model.graph.append(node)
    model.graph.outputs.append(output)
    ir.save(model, folder / file.name)
    for location in {
        str(v.const_value.location) for v in model.graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)
    }:
        link_or_copy(file.parent / location, folder / location)
    return path


class _TappedSession:
    """A session that keeps its second output, ``seen``, to itself."""

    def __init__(self, session: Session):
        self._session = session
        self._binding: Binding | None = None
        self.inputs: tuple[TensorSpec, ...] = session.inputs
        self.outputs: tuple[TensorSpec, ...] = tuple(spec for spec in session.outputs if spec.name != OUTPUT)

    def bind(self, axes: Mapping[str, int], shared: Mapping[str, np.ndarray] = NOT_SHARED) -> Binding:
        self._binding = self._session.bind(axes, shared)
        return _WithoutFeatures(self._binding)

    @property
    def seen(self) -> np.ndarray:
        assert self._binding is not None
        return self._binding.outputs[OUTPUT]


class _WithoutFeatures:
    def __init__(self, binding: Binding):
        self.inputs: Mapping[str, np.ndarray] = binding.inputs
        self.outputs: Mapping[str, np.ndarray] = {name: array for name, array in binding.outputs.items() if name != OUTPUT}
        self._binding = binding

    def run(self) -> None:
        self._binding.run()


def _points(array: np.ndarray) -> np.ndarray:
    """[batch, channels, h, w] or [batch, tokens, channels] as float32 [points, channels]; always a copy."""
    last = np.moveaxis(array, 1, -1) if array.ndim == 4 else array
    return last.reshape(-1, last.shape[-1]).astype(np.float32)
