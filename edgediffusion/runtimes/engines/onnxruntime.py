"""ONNX Runtime on a CPU. A built engine is the graph as ONNX Runtime optimized it for this processor.

An optimized graph is loaded without optimizing again, and its weights lie in a file of their own that is mapped
rather than read. It holds layouts that fit one processor (blocks of 8 or 16 channels), so it goes to no other kind.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from edgediffusion.bundle import TensorSpec, axis_size
from edgediffusion.errors import EngineError
from edgediffusion.registry import require
from edgediffusion.runtimes.engines import NOT_SHARED, NodeTime, allocate

suffix = ".optimized.onnx"

_ERRORS_ONLY = 3
# Fused to a Gemm, a quantized linear layer with a bias falls back to float; apart, it becomes one int8 product. For
# float layers the fusion makes no difference (benchmarks/cpu_graph.py).
_UNWANTED_FUSIONS = ("MatMulAddFusion",)
_SMALLEST_OUTSIDE_BYTES = 1024
_KERNEL = "_kernel_time"  # ends the name of a profile's event that is the run of a node
_BLOCK = 5  # timed runs of a graph before the next one's turn
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


def version() -> str:
    return str(_library().__version__)


def build(model: Path, engine: Path, *, threads: int | None = None) -> None:
    """Optimize an ONNX file for this processor; writes ``engine`` and, for its weights, ``engine`` + ``.data``.

    Raises:
        EngineError: ONNX Runtime cannot read the file, or has no implementation of one of its operators.
    """
    options = _options(threads, optimize=True)
    options.optimized_model_filepath = str(engine)
    prefix = "session.optimized_model_external_initializers_"
    options.add_session_config_entry(prefix + "file_name", engine.name + ".data")
    options.add_session_config_entry(prefix + "min_size_in_bytes", str(_SMALLEST_OUTSIDE_BYTES))
    with _mapped(f"ONNX Runtime could not optimize '{model.parent.name}/{model.name}'"):
        _session(model, options)


def open_session(file: Path, *, threads: int | None = None, lean: bool = False) -> OnnxRuntimeSession:
    """Load an engine that ``build`` made, or any ONNX file. ``threads`` is by default the cores this process may use.

    A ``lean`` session gives memory back to the system when a node is done with it, where it else keeps an arena, which grows by doubling.

    Raises:
        EngineError: the file is missing, damaged, or uses an operator that ONNX Runtime does not have.
    """
    options = _options(threads, optimize=not file.name.endswith(suffix))
    options.enable_cpu_mem_arena = options.enable_mem_pattern = not lean
    with _mapped(f"ONNX Runtime could not load '{file.parent.name}/{file.name}'"):
        return OnnxRuntimeSession(_session(file, options))


def time_nodes(
    files: Sequence[Path], feeds: Mapping[str, np.ndarray], *, runs: int, threads: int | None = None
) -> list[tuple[NodeTime, ...]]:
    """For each ONNX file its nodes, in the order in which they ran, with the times of ``runs`` runs: ONNX Runtime's own profile.

    The graphs take turns, a few runs each, so that what disturbs one disturbs all. The first run of a turn is not counted: the
    worker threads of the graph before still spin. Names are those of the graph as ONNX Runtime optimized it.

    Raises:
        EngineError: a file cannot be loaded or run with ``feeds``.
    """
    counted: list[int] = []
    with tempfile.TemporaryDirectory() as folder, _mapped("ONNX Runtime could not profile the graph"):
        sessions = [_profiled(file, Path(folder) / str(at), threads) for at, file in enumerate(files)]
        given = {name: np.asarray(array) for name, array in feeds.items()}
        done = 0
        while len(counted) < runs:
            block = min(_BLOCK, runs - len(counted))
            for session in sessions:
                for _ in range(block + 1):
                    session.run(None, given)
            counted.extend(range(done + 1, done + 1 + block))
            done += block + 1
        profiles = [json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")) for session in sessions]
    return [_node_times(profile, done, counted) for profile in profiles]


def _profiled(file: Path, prefix: Path, threads: int | None) -> Any:
    options = _options(threads, optimize=not file.name.endswith(suffix))
    options.enable_profiling = True
    options.profile_file_prefix = str(prefix)
    return _session(file, options)


def _node_times(profile: Sequence[Mapping[str, Any]], done: int, counted: Sequence[int]) -> tuple[NodeTime, ...]:
    events = [e for e in profile if e.get("cat") == "Node" and str(e.get("name")).endswith(_KERNEL)]
    nodes = len(events) // done
    first = events[:nodes]
    if len(events) != nodes * done or any(e["name"] != first[i % nodes]["name"] for i, e in enumerate(events)):
        raise EngineError("ONNX Runtime's profile does not have every node once a run", got=f"{len(events)} events of {done} runs")
    return tuple(
        NodeTime(e["name"].removesuffix(_KERNEL), e["args"]["op_name"], tuple(events[run * nodes + i]["dur"] / 1e3 for run in counted))
        for i, e in enumerate(first)
    )


class OnnxRuntimeSession:
    def __init__(self, session: Any):
        self._session = session
        self.inputs = tuple(_spec(argument) for argument in session.get_inputs())
        self.outputs = tuple(_spec(argument) for argument in session.get_outputs())

    def bind(self, axes: Mapping[str, int], shared: Mapping[str, np.ndarray] = NOT_SHARED) -> OnnxRuntimeBinding:
        """Buffers on the CPU. An output axis that ``axes`` lacks is found out by one run on zeros.

        Raises:
            EngineError: ``axes`` lacks an axis of an input, the graph cannot run at these sizes, or a shared array does not fit.
        """
        inputs = allocate(self.inputs, axes, shared)
        given = [spec for spec in self.outputs if spec.name not in shared]
        lacking = [spec for spec in given if any(isinstance(n, str) and axis_size(n, axes) is None for n in spec.shape)]
        if lacking:
            with _mapped("ONNX Runtime could not run the graph"):
                found = self._session.run([spec.name for spec in lacking], inputs)
            shared = {**shared, **{spec.name: np.zeros_like(array) for spec, array in zip(lacking, found, strict=True)}}
        return OnnxRuntimeBinding(self._session, inputs, allocate(self.outputs, axes, shared))


class OnnxRuntimeBinding:
    def __init__(self, session: Any, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]):
        self.inputs, self.outputs = inputs, outputs
        self._session, self._binding = session, session.io_binding()
        for arrays, bind in ((inputs, self._binding.bind_input), (outputs, self._binding.bind_output)):
            for name, array in arrays.items():
                bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def run(self) -> None:
        with _mapped("ONNX Runtime could not run the graph"):
            self._session.run_with_iobinding(self._binding)


def _library() -> Any:
    return require("onnxruntime", extra="cpu", purpose="Running on this CPU")


def _session(file: Path, options: Any) -> Any:
    return _library().InferenceSession(str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(_UNWANTED_FUSIONS))


def _options(threads: int | None, *, optimize: bool) -> Any:
    library = _library()
    options = library.SessionOptions()
    level = library.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads or _default_threads()
    options.log_severity_level = _ERRORS_ONLY
    return options


def _default_threads() -> int:
    """0, ONNX Runtime's own choice, where this process may use every core; else the number that it may use.

    With its own choice it also binds each thread to a core. Threads that are not bound were seen to share one core
    while the other was idle, which made a step of the reference UNet between one and two times as long. But it counts
    the machine's cores, also where a container or ``taskset`` leaves fewer.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return 0 if cores in (0, os.cpu_count()) else cores


def _spec(argument: Any) -> TensorSpec:
    if argument.type not in _DTYPES:
        raise EngineError(f"The tensor '{argument.name}' has a type that NumPy lacks", got=argument.type, allowed=", ".join(_DTYPES))
    shape = tuple(f"{argument.name}.{i}" if size is None else size for i, size in enumerate(argument.shape))
    return TensorSpec(argument.name, _DTYPES[argument.type], shape)


@contextmanager
def _mapped(wrong: str) -> Iterator[None]:
    """Every exception that ONNX Runtime raises becomes an EngineError.

    Its own classes have no base in common, and it also raises the plain ones below for bad feeds and types.
    """
    expected: tuple[type[Exception], ...] = (RuntimeError, ValueError, TypeError, *_native_errors())
    try:
        yield
    except expected as error:
        raise EngineError(wrong, got=f"{type(error).__name__}: {error}") from error


@cache
def _native_errors() -> tuple[type[Exception], ...]:
    native = vars(require("onnxruntime.capi.onnxruntime_pybind11_state", extra="cpu", purpose="Running on this CPU"))
    return tuple(value for value in native.values() if isinstance(value, type) and issubclass(value, Exception))
