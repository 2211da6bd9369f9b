"""ONNX Runtime on a CPU. A built engine is the graph as ONNX Runtime optimized it for this processor.

An optimized graph is loaded without optimizing again, and its weights lie in a file of their own that is mapped
rather than read. It holds layouts that fit one processor (blocks of 8 or 16 channels), so it goes to no other kind.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgediffusion.bundle import axis_size
from edgediffusion.errors import EngineError
from edgediffusion.runtimes.engines import NOT_SHARED, NodeTime, allocate
from edgediffusion.runtimes.engines._onnxruntime import keep_optimized, library, mapped, session_options, spec_of

suffix = ".optimized.onnx"

# Fused to a Gemm, a quantized linear layer with a bias falls back to float; apart, it becomes one int8 product. For
# float layers the fusion makes no difference (benchmarks/cpu_graph.py).
_UNWANTED_FUSIONS = ("MatMulAddFusion",)
_KERNEL = "_kernel_time"  # ends the name of a profile's event that is the run of a node
_BLOCK = 5  # timed runs of a graph before the next one's turn


def version() -> str:
    return str(library().__version__)


def build(model: Path, engine: Path, *, threads: int | None = None) -> None:
    """Optimize an ONNX file for this processor; writes ``engine`` and, for its weights, ``engine`` + ``.data``.

    Raises:
        EngineError: ONNX Runtime cannot read the file, or has no implementation of one of its operators.
    """
    options = session_options(threads, optimize=True)
    keep_optimized(options, engine)
    with mapped(f"ONNX Runtime could not optimize '{model.parent.name}/{model.name}'"):
        _session(model, options)


def open_session(file: Path, *, threads: int | None = None, lean: bool = False) -> OnnxRuntimeSession:
    """Load an engine that ``build`` made, or any ONNX file. ``threads`` is by default the cores this process may use.

    A ``lean`` session gives memory back to the system when a node is done with it, where it else keeps an arena, which grows by doubling.

    Raises:
        EngineError: the file is missing, damaged, or uses an operator that ONNX Runtime does not have.
    """
    options = session_options(threads, optimize=not file.name.endswith(suffix))
    options.enable_cpu_mem_arena = options.enable_mem_pattern = not lean
    with mapped(f"ONNX Runtime could not load '{file.parent.name}/{file.name}'"):
        return OnnxRuntimeSession(_session(file, options))


def time_nodes(
    files: Sequence[Path], feeds: Mapping[str, np.ndarray], *, runs: int, threads: int | None = None
) -> list[tuple[NodeTime, ...]]:
    """For each ONNX file its nodes, in the order in which they ran, with the times of ``runs`` runs: ONNX Runtime's own profile.

    The graphs take turns, a few runs each, so that what disturbs one disturbs all. The first run of a turn is not counted:
    its threads sleep and the caches hold another graph. Names are those of the graph as ONNX Runtime optimized it.

    Raises:
        EngineError: a file cannot be loaded or run with ``feeds``.
    """
    counted: list[int] = []
    with tempfile.TemporaryDirectory() as folder, mapped("ONNX Runtime could not profile the graph"):
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
    options = session_options(threads, optimize=not file.name.endswith(suffix))
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
        self.inputs = tuple(spec_of(argument) for argument in session.get_inputs())
        self.outputs = tuple(spec_of(argument) for argument in session.get_outputs())

    def bind(self, axes: Mapping[str, int], shared: Mapping[str, np.ndarray] = NOT_SHARED) -> OnnxRuntimeBinding:
        """Buffers on the CPU. An output axis that ``axes`` lacks is found out by one run on zeros.

        Raises:
            EngineError: ``axes`` lacks an axis of an input, the graph cannot run at these sizes, or a shared array does not fit.
        """
        inputs = allocate(self.inputs, axes, shared)
        given = [spec for spec in self.outputs if spec.name not in shared]
        lacking = [spec for spec in given if any(isinstance(n, str) and axis_size(n, axes) is None for n in spec.shape)]
        if lacking:
            with mapped("ONNX Runtime could not run the graph"):
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
        with mapped("ONNX Runtime could not run the graph"):
            self._session.run_with_iobinding(self._binding)


def _session(file: Path, options: Any) -> Any:
    return library().InferenceSession(str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(_UNWANTED_FUSIONS))
