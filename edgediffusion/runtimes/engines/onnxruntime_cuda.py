"""ONNX Runtime on an NVIDIA GPU, by its CUDA provider. A built engine is the graph as ONNX Runtime optimized it for that.

Arrays of a binding lie here, each with its twin on the GPU, and a run is launched as one CUDA graph where no node is on the processor.
Takes any sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgediffusion.runtimes.engines._onnxruntime import keep_optimized
from edgediffusion.runtimes.engines._onnxruntime_gpu import CUDA, GpuSession, Provider, gpu_options

suffix = ".cuda.onnx"
options = ("compute_capabilities",)

_provider = Provider(CUDA)
version, compute_capability = _provider.version, _provider.compute_capability


def build(model: Path, engine: Path, *, threads: int | None = None, compute_capabilities: Sequence[str] = ()) -> None:
    """Optimize an ONNX file for the GPU that is here; writes ``engine`` and, for its weights, ``engine`` + ``.data``.

    Raises:
        EngineError: there is no such GPU or provider, the file cannot be read, or products of it would run on the processor.
    """
    _provider.check_here(compute_capabilities)
    settings = gpu_options(threads, optimize=True)
    keep_optimized(settings, engine)
    _provider.session(model, settings, {}, graphs=False)


def open_session(file: Path, *, threads: int | None = None) -> GpuSession:
    """Load an engine that ``build`` made, or any ONNX file.

    Raises:
        EngineError: there is no GPU or provider, the file is missing or damaged, or products of it would run on the processor.
    """
    _provider.compute_capability()
    session, noted = _provider.session(file, gpu_options(threads, optimize=not file.name.endswith(suffix)), {}, graphs=True)
    return GpuSession(session, noted=noted, title=_provider.title)
