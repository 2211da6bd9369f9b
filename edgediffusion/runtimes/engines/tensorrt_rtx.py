"""TensorRT for RTX: GeForce and workstation GPUs. Engines are built ahead of time, on a machine with or without a GPU, and finished
on the GPU when they are loaded. It times nothing when it builds, so it has no timing cache (its 1.1 release notes)."""

from __future__ import annotations

from edgediffusion.runtimes.engines._tensorrt import TensorRT

suffix = ".rtx"
options = ("compute_capabilities", "shapes", "progress")
reads_onnx = False
portable = ("os",)  # docs.nvidia.com/deeplearning/tensorrt-rtx: "portable to both Windows and Linux operating systems"

_library = TensorRT("tensorrt_rtx", extra="rtx", title="TensorRT for RTX", seconds_per_layer=0.002)
version, build, open_session, compute_capability, invalidity = (
    _library.version,
    _library.build,
    _library.open_session,
    _library.compute_capability,
    _library.invalidity,
)
