"""Graphs of other tools in our pipeline: a plain graph for them to read, and engines that run what they made."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgediffusion.bundle import Component
from edgediffusion.optimize.graph_file import load_graph
from edgediffusion.runtimes.engines import NOT_SHARED, _onnxruntime, onnxruntime, resolve


def plain_graph(model: Path, output: Path) -> None:
    """The graph with float32 weights inside of it, as layers hold them: ours has the checkpoint's own tensors, float16 and not
    transposed, and nodes that convert them. Tools do not take what comes out of a node for a weight."""
    import onnx_ir as ir
    from onnxscript.optimizer import fold_constants

    graph, all_sizes = load_graph(model), 1 << 40
    for name, value in graph.graph.initializers.items():
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy().copy(), name=name)
    fold_constants(graph, input_size_limit=all_sizes, output_size_limit=all_sizes)
    for name, value in list(graph.graph.initializers.items()):
        if not value.uses():
            del graph.graph.initializers[name]
    ir.save(graph, output)


def open_foreign(file: Path, component: Component, engine: str) -> Any:
    """A session of the graph, its tensors named and shaped as the component's: tools lose names of axes."""
    session = ENGINES[engine](file)
    session.inputs, session.outputs = component.inputs, component.outputs
    return session


def _of_onnxruntime(file: Path, without: Sequence[str]) -> Any:
    import onnxruntime as library

    options = _onnxruntime.session_options(None, optimize=True)
    with _onnxruntime.mapped(f"ONNX Runtime could not load '{file.parent.name}/{file.name}'"):
        session = library.InferenceSession(str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(without))
    return onnxruntime.OnnxRuntimeSession(session)


class _OpenVino:
    """Compiled anew for each set of shapes: fixed ones are the fastest."""

    def __init__(self, file: Path, precision: str):
        self._file = file
        self._hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
        self.inputs: Any = ()
        self.outputs: Any = ()

    def bind(self, axes: Mapping[str, int], shared: Mapping[str, np.ndarray] = NOT_SHARED) -> _OpenVinoBinding:
        import openvino

        core = openvino.Core()
        model = core.read_model(self._file)
        model.reshape({spec.name: list(resolve(spec, axes)) for spec in self.inputs})
        request = core.compile_model(model, "CPU", self._hints).create_infer_request()
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


# By engine and options. What stays float is bfloat16 in OpenVINO by default, on a processor that has it. ONNX Runtime 1.31
# refuses what its own QDQPropagationTransformer makes of NNCF's graph: a signed output_dtype beside an unsigned zero point.
ENGINES: dict[str, Callable[[Path], Any]] = {
    "onnxruntime": onnxruntime.open_session,
    "onnxruntime, all optimizers": lambda file: _of_onnxruntime(file, ()),
    "onnxruntime, no QDQPropagation": lambda file: _of_onnxruntime(file, ("QDQPropagationTransformer",)),
    "openvino bf16": lambda file: _OpenVino(file, "bf16"),
    "openvino f32": lambda file: _OpenVino(file, "f32"),
}


def use_library(python: Path) -> None:
    """Let ``openvino`` be imported from another environment of this Python; everything else is found in our own before it."""
    (packages,) = python.parent.parent.glob("lib/python*/site-packages")
    if str(packages) not in sys.path:
        sys.path.append(str(packages))
