"""ONNX Runtime on an NVIDIA GPU, by its TensorRT provider; what that declines, its CUDA provider runs.

A built engine is the provider's cache of TensorRT engines and of what kernels took, in a folder beside a file that names the ONNX file
of the bundle: the graph is read from there, and its weights are not kept twice. An engine is made for ranges of sizes, so that a size out
of them is refused here, where the provider would build anew, for minutes, and write into the bundle.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgediffusion.errors import EngineError
from edgediffusion.runtimes.engines._described import Described, described
from edgediffusion.runtimes.engines._onnxruntime_gpu import CUDA, TENSORRT, GpuSession, Provider, gpu_options, profile_shapes
from edgediffusion.runtimes.onnx_header import read_header
from edgediffusion.runtimes.sizes import Sizes, ranges_for

suffix = ".ort-tensorrt"
options = ("compute_capabilities", "shapes")
reads_onnx = False

_CACHE, _ENGINES = ".cache", "*.engine"
_SWITCHES = {"float16": "trt_fp16_enable", "bfloat16": "trt_bf16_enable", "int8": "trt_int8_enable"}
_provider = Provider(TENSORRT, after=(CUDA,))
version, compute_capability = _provider.version, _provider.compute_capability


def build(
    model: Path, engine: Path, *, threads: int | None = None, compute_capabilities: Sequence[str] = (), shapes: Sizes | None = None
) -> None:
    """Have the provider build its engines of an ONNX file; writes ``engine``, ``engine`` + ``.json`` and ``engine`` + ``.cache``/.

    ``shapes`` are ranges of sizes for every named axis of the inputs.

    Raises:
        EngineError: there is no such GPU or provider, an axis has no range, the provider took no part of the graph, or products of it
        would run on the processor.
    """
    _provider.check_here(compute_capabilities)
    header = read_header(model)
    ranges = ranges_for(header.inputs, shapes or {}, model.parent.name)
    switches = {_SWITCHES[name]: "1" for name in header.formats if name in _SWITCHES}
    known = Described(header.inputs, header.outputs, ranges, settings={**switches, **profile_shapes(header.inputs, ranges)})
    folder = engine.with_name(engine.name + _CACHE)
    folder.mkdir()
    _provider.session(model, gpu_options(threads, optimize=True), _settings(known, folder), graphs=False)
    if not any(folder.glob(_ENGINES)):
        raise EngineError(f"{_provider.title} took no part of '{model.parent.name}/{model.name}'", do="Build for another engine.")
    engine.write_text(f"{model.parent.name}/{model.name}\n", encoding="utf-8")
    known.write(engine)


def open_session(file: Path, *, threads: int | None = None) -> GpuSession:
    """Load an engine that ``build`` made, from the bundle that it is in.

    Raises:
        EngineError: there is no GPU or provider, the file is missing, damaged or no engine, or the bundle's graph is not there.
    """
    known, folder = described(file), file.with_name(file.name + _CACHE)
    _provider.compute_capability()
    model = _model_of(file)
    if not any(folder.glob(_ENGINES)):
        raise EngineError(
            f"'{file.parent.name}/{folder.name}' has no engines of TensorRT", do="Build it anew with: edgediffusion build BUNDLE -o NEW"
        )
    session, noted = _provider.session(model, gpu_options(threads, optimize=True), _settings(known, folder), graphs=True)
    return GpuSession(session, noted=noted, title=_provider.title, ranges=known.ranges)


def _settings(known: Described, cache: Path) -> dict[str, str]:
    kept = {"trt_engine_cache_enable": "1", "trt_timing_cache_enable": "1"}
    return {**known.settings, **kept, "trt_engine_cache_path": str(cache), "trt_timing_cache_path": str(cache)}


def _model_of(file: Path) -> Path:
    """The ONNX file that an engine names, in the bundle above it: its engines lie two folders down, three while they are picked."""
    try:
        name = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        name = ""
    found = [parent / name for parent in list(file.parents)[1:4] if name and ".." not in name and (parent / name).is_file()]
    if not found:
        raise EngineError(f"'{file.parent.name}/{file.name}' is no engine of a bundle", got=f"the graph '{name}', which is not there")
    return found[0]
