"""Graphs of other tools in our pipeline: a plain graph for them to read, and engines that run what they made."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgediffusion.bundle import Component
from edgediffusion.optimize.graph_file import load_graph
from edgediffusion.runtimes.engines import onnxruntime, resolve


def plain_graph(model: Path, output: Path) -> None:
    """The graph with float32 weights inside of it: ours has the checkpoint's own float16 ones, a Cast behind each."""
    import onnx_ir as ir

    graph = load_graph(model)
    for node in list(graph.graph):
        source = node.inputs[0] if node.op_type == "Cast" else None
        if source is None or source.const_value is None or not source.is_initializer():
            continue
        tensor = ir.tensor(source.const_value.numpy().astype(np.float32), name=f"{source.name}.float32")
        value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.graph.register_initializer(value)
        node.outputs[0].replace_all_uses_with(value)
        graph.graph.remove(node, safe=True)
    for name, value in list(graph.graph.initializers.items()):
        if value.uses():
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy().copy(), name=name)
        else:
            del graph.graph.initializers[name]
    ir.save(graph, output)


def open_foreign(file: Path, component: Component, engine: str) -> Any:
    """A session of the graph, its tensors named and shaped as the component's: tools lose names of axes."""
    session = ENGINES[engine](file)
    session.inputs, session.outputs = component.inputs, component.outputs
    return session


def _onnxruntime(file: Path, without: Sequence[str]) -> Any:
    import onnxruntime as library

    options = onnxruntime._options(None, optimize=True)
    with onnxruntime._mapped(f"ONNX Runtime could not load '{file.parent.name}/{file.name}'"):
        session = library.InferenceSession(str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(without))
    return onnxruntime.OnnxRuntimeSession(session)


class _OpenVino:
    """Compiled anew for each set of shapes: fixed ones are the fastest."""

    def __init__(self, file: Path):
        self._file = file
        self.inputs: Any = ()
        self.outputs: Any = ()

    def bind(self, axes: Mapping[str, int]) -> _OpenVinoBinding:
        import openvino

        core = openvino.Core()
        model = core.read_model(self._file)
        model.reshape({spec.name: list(resolve(spec, axes)) for spec in self.inputs})
        request = core.compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY"}).create_infer_request()
        buffers = [{spec.name: np.zeros(resolve(spec, axes), spec.dtype) for spec in specs} for specs in (self.inputs, self.outputs)]
        for name, array in buffers[0].items():
            request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
        (output,) = buffers[1].values()
        request.set_output_tensor(0, openvino.Tensor(output, shared_memory=True))
        return _OpenVinoBinding(request, *buffers)


class _OpenVinoBinding:
    def __init__(self, request: Any, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]):
        self._request, self.inputs, self.outputs = request, inputs, outputs

    def run(self) -> None:
        self._request.infer()


# By engine and options. ONNX Runtime 1.31 refuses what its own QDQPropagationTransformer makes of NNCF's graph: a signed
# output_dtype beside an unsigned zero point.
ENGINES: dict[str, Callable[[Path], Any]] = {
    "onnxruntime": onnxruntime.open_session,
    "onnxruntime, all optimizers": lambda file: _onnxruntime(file, ()),
    "onnxruntime, no QDQPropagation": lambda file: _onnxruntime(file, ("QDQPropagationTransformer",)),
    "openvino": _OpenVino,
}


def use_library(python: Path) -> None:
    """Let ``openvino`` be imported from another environment of this Python; everything else is found in our own before it."""
    (packages,) = python.parent.parent.glob("lib/python*/site-packages")
    if str(packages) not in sys.path:
        sys.path.append(str(packages))
