"""ONNX Runtime's providers for NVIDIA GPUs: the same sessions, with their buffers on the GPU and a run as one CUDA graph.

What a provider declines, ONNX Runtime runs on the processor without a word. Here that is refused: where the provider is not there at
all, and where a product of the graph is not on the GPU. (Arithmetic of shapes belongs on the processor.)
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgediffusion import targets
from edgediffusion.bundle import TensorSpec, axis_size
from edgediffusion.errors import EngineError
from edgediffusion.runtimes.engines import NOT_SHARED, _onnxruntime, allocate
from edgediffusion.runtimes.engines._onnxruntime import mapped, session_options, spec_of
from edgediffusion.runtimes.sizes import Sizes, check_sizes

CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
EXTRA = "gpu"
_TITLES = {CUDA: "CUDA", TENSORRT: "TensorRT"}
_GRAPHS = {CUDA: "enable_cuda_graph", TENSORRT: "trt_cuda_graph_enable"}
_DEVICE = ("cuda", 0)
_ON_PROCESSOR = "CPUExecutionProvider"
_PRODUCTS = {"Conv", "FusedConv", "ConvTranspose", "ConvInteger", "QLinearConv", "Gemm", "MatMul", "FusedMatMul", "MatMulInteger"} | {
    *("QLinearMatMul", "QGemm", "Attention", "MultiHeadAttention", "Einsum")
}
# A session keeps what it has noted down to its end, and with it the buffers of a binding that is gone: so the first few bindings have
# graphs, twice as many as sets of shapes are kept (graph.KEPT_SHAPES), and those that come after them have none.
_MOST_GRAPHS = 16
_GRAPH_OF, _NO_GRAPH = "gpu_graph_id", "-1"


@dataclass(frozen=True)
class Provider:
    """One provider by ONNX Runtime's name for it; those in ``after`` take what it declines."""

    name: str
    after: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"ONNX Runtime's provider for {_TITLES[self.name]}"

    def version(self) -> str:
        """ONNX Runtime's version, if it is one with this provider.

        Raises:
            EngineError: it has no such provider. MissingExtra: it is not installed.
        """
        library = _onnxruntime.library(EXTRA)
        there = library.get_available_providers()
        if self.name not in there:
            raise EngineError(
                f"This onnxruntime has no provider for {_TITLES[self.name]}",
                got=f"onnxruntime {library.__version__} with {', '.join(there)}",
                do=f"Put the other build in its place: pip uninstall onnxruntime, then pip install 'edgediffusion[{EXTRA}]'.",
            )
        return str(library.__version__)

    def compute_capability(self) -> str:
        """That of the first NVIDIA GPU here. Errors as ``version``, and EngineError where there is no GPU."""
        self.version()
        found = [gpu.compute_capability for gpu in targets.cuda_devices() if gpu.compute_capability]
        if not found:
            raise EngineError(f"{self.title} needs an NVIDIA GPU, and this machine shows none", do="Use one with a GPU and its driver.")
        return found[0]

    def check_here(self, wanted: Sequence[str]) -> None:
        """Refuse to build for another GPU than the one that is here: kernels are chosen on it."""
        here = self.compute_capability()
        if any(one != here for one in wanted):
            raise EngineError(
                f"{self.title} builds engines on the GPU that they are for",
                got=f"compute capability {', '.join(wanted)}, here {here}",
                do="Copy the bundle to that machine and build there.",
            )

    def session(self, model: Path, options: Any, settings: Mapping[str, str], *, graphs: bool) -> tuple[Any, bool]:
        """A session of an ONNX file, and whether its runs can be noted down as CUDA graphs.

        Raises:
            EngineError: the provider could not be loaded, or products would run on the processor.
        """
        library = _onnxruntime.library(EXTRA)
        if hasattr(library, "preload_dlls"):  # CUDA's and cuDNN's libraries of NVIDIA's packages; what it cannot find it prints
            with redirect_stdout(io.StringIO()):
                library.preload_dlls()
        if hasattr(library.InferenceSession, "get_provider_graph_assignment_info"):
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        name = f"{model.parent.name}/{model.name}"
        with mapped(f"{self.title} could not load '{name}'"):
            session, noted = self._opened(library, model, options, settings, graphs=graphs)
        if self.name not in session.get_providers():
            raise EngineError(
                f"{self.title} could not be loaded, and ONNX Runtime would run '{name}' without it",
                got=", ".join(session.get_providers()),
                do="Install the CUDA and cuDNN that this onnxruntime was built for: onnxruntime.ai/docs/execution-providers.",
            )
        _refuse_products_on_the_processor(session, name)
        return session, noted

    def _opened(self, library: Any, model: Path, options: Any, settings: Mapping[str, str], *, graphs: bool) -> tuple[Any, bool]:
        """With CUDA graphs where ONNX Runtime lets: not for graphs that have nodes on the processor, shapes' for instance."""

        def opened(noted: bool) -> Any:
            own = {"device_id": str(_DEVICE[1]), **settings, **({_GRAPHS[self.name]: "1"} if noted else {})}
            providers = [(self.name, own), *((other, {"device_id": str(_DEVICE[1])}) for other in self.after)]
            return library.InferenceSession(str(model), options, providers=providers)

        if not graphs:
            return opened(False), False
        try:
            return opened(True), True
        except Exception as error:  # its class differs by version; any other trouble comes again without graphs
            if "graph" not in str(error).lower():
                raise
            return opened(False), False


def gpu_options(threads: int | None, *, optimize: bool) -> Any:
    return session_options(threads, optimize=optimize)


def _refuse_products_on_the_processor(session: Any, name: str) -> None:
    ask = getattr(session, "get_provider_graph_assignment_info", None)  # ONNX Runtime 1.24 and later
    if ask is None:
        return
    nodes = [(part.ep_name, node) for part in ask() for node in part.get_nodes()]
    products = [(where, node) for where, node in nodes if node.op_type in _PRODUCTS]
    left = [f"{node.op_type} '{node.name}'" for where, node in products if where == _ON_PROCESSOR]
    if left:
        raise EngineError(
            f"ONNX Runtime would run products of '{name}' on the processor",
            got=f"{len(left)} that the GPU's providers decline, as {', '.join(left[:3])}",
            do="Take an engine that has kernels for them, or export or quantize the bundle for this target.",
        )


class GpuSession:
    def __init__(self, session: Any, *, noted: bool, title: str, ranges: Sizes | None = None):
        """``noted``: runs may be noted down as CUDA graphs; ``ranges`` of sizes that there are kernels for."""
        self.inputs = tuple(spec_of(argument) for argument in session.get_inputs())
        self.outputs = tuple(spec_of(argument) for argument in session.get_outputs())
        self._session, self._noted, self._title, self._ranges = session, noted, title, ranges or {}
        self._graphs = 0

    def bind(self, axes: Mapping[str, int], shared: Mapping[str, np.ndarray] = NOT_SHARED) -> GpuBinding:
        """Arrays here, each with its twin on the GPU; ``shared`` ones are copied like the others. An output axis that ``axes`` lacks is
        found out by one run on zeros.

        Raises:
            EngineError: ``axes`` lacks an axis of an input or has a size out of range, a shared array does not fit, or the GPU is full.
        """
        check_sizes(axes, self._ranges, self._title)
        inputs = allocate(self.inputs, axes, shared)
        lacking = [
            s for s in self.outputs if s.name not in shared and any(axis_size(n, axes) is None for n in s.shape if isinstance(n, str))
        ]
        with mapped(f"{self._title} could not run the graph"):
            if lacking:
                found = self._session.run([spec.name for spec in lacking], inputs, self._run_options(_NO_GRAPH))
                shared = {**shared, **{spec.name: np.zeros_like(array) for spec, array in zip(lacking, found, strict=True)}}
            return GpuBinding(self._session, inputs, allocate(self.outputs, axes, shared), self._run_options(self._next()), self._title)

    def _next(self) -> str:
        """The number of a binding's CUDA graph: each has buffers of its own, and so a graph of its own."""
        self._graphs += 1
        return str(self._graphs) if self._noted and self._graphs <= _MOST_GRAPHS else _NO_GRAPH

    def _run_options(self, graph: str) -> Any:
        options = _onnxruntime.library(EXTRA).RunOptions()
        if self._noted:
            options.add_run_config_entry(_GRAPH_OF, graph)
        return options


class GpuBinding:
    def __init__(self, session: Any, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray], options: Any, title: str):
        self.inputs, self.outputs = inputs, outputs
        self._session, self._options, self._title = session, options, title
        self._binding = session.io_binding()
        make = _onnxruntime.library(EXTRA).OrtValue.ortvalue_from_numpy
        self._fed = {name: make(array, *_DEVICE) for name, array in inputs.items()}
        self._found = {name: make(array, *_DEVICE) for name, array in outputs.items()}
        for name, value in self._fed.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in self._found.items():
            self._binding.bind_ortvalue_output(name, value)

    def run(self) -> None:
        with mapped(f"{self._title} could not run the graph"):
            for name, array in self.inputs.items():
                self._fed[name].update_inplace(array)
            self._session.run_with_iobinding(self._binding, self._options)
            for name, array in self.outputs.items():
                np.copyto(array, self._found[name].numpy())


def profile_shapes(inputs: Sequence[TensorSpec], ranges: Sizes) -> dict[str, str]:
    """Sizes of the inputs as TensorRT's provider reads them: ``sample:1x4x64x64,encoder_hidden_states:1x77x768`` for each end."""
    found = {}
    for key, end in (("min", "smallest"), ("opt", "usual"), ("max", "largest")):
        shapes = [
            f"{spec.name}:" + "x".join(str(n if isinstance(n, int) else getattr(ranges[n], end)) for n in spec.shape)
            for spec in inputs
            if any(isinstance(n, str) for n in spec.shape)
        ]
        if shapes:
            found[f"trt_profile_{key}_shapes"] = ",".join(shapes)
    return found
