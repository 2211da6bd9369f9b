"""TensorRT: NVIDIA's servers and Jetsons. It builds on the device that engines are for, and for that one only."""

from __future__ import annotations

from edgediffusion.runtimes.engines._tensorrt import TensorRT

suffix = ".plan"
options = ("compute_capabilities", "shapes", "timing_cache", "workspace_bytes", "progress")
reads_onnx = False

_library = TensorRT("tensorrt", extra="tensorrt", title="TensorRT")
version, build, open_session, compute_capability = (
    _library.version,
    _library.build,
    _library.open_session,
    _library.compute_capability,
)
