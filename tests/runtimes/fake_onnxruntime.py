"""ONNX Runtime as if it were the build for NVIDIA GPUs, on a machine with one: the real library computes, on the processor.

"The GPU" has buffers of its own, so that what is not copied is not seen. ``seen`` keeps what sessions were opened and run with.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as real
import pytest

CUDA, TENSORRT, PROCESSOR = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"


@dataclass
class Fake:
    """``loads``: whether providers can be loaded; ``declined``: operators that the GPU's providers leave to the processor;
    ``noted``: whether runs can be noted down."""

    available: tuple[str, ...] = (TENSORRT, CUDA, PROCESSOR)
    loads: bool = True
    declined: tuple[str, ...] = ("Gather",)
    noted: bool = True
    sessions: list[dict[str, Any]] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)  # the CUDA graph of each run
    __version__ = real.__version__
    SessionOptions, GraphOptimizationLevel = real.SessionOptions, real.GraphOptimizationLevel

    def __post_init__(self) -> None:
        fake = self

        class InferenceSession(FakeSession):
            def __init__(self, path: str, options: Any, providers: Sequence[Any]):
                super().__init__(fake, path, options, providers)

        self.InferenceSession = InferenceSession
        self.OrtValue = SimpleNamespace(ortvalue_from_numpy=self._on_gpu)

    def get_available_providers(self) -> list[str]:
        return list(self.available)

    def preload_dlls(self) -> None:
        sys.stdout.write("a line that must not be among results")

    def RunOptions(self) -> Any:
        options = real.RunOptions()
        fake = self

        class Options:
            entries: dict[str, str]

            def __init__(self) -> None:
                self.entries, self.real = {}, options

            def add_run_config_entry(self, key: str, value: str) -> None:
                assert fake.noted
                self.entries[key] = value

        return Options()

    def _on_gpu(self, array: np.ndarray, device: str, number: int) -> Any:
        assert (device, number) == ("cuda", 0)
        return real.OrtValue.ortvalue_from_numpy(array.copy())


class FakeSession:
    def __init__(self, fake: Fake, path: str, options: Any, providers: Sequence[Any]):
        self.fake, self.providers = fake, dict(providers)
        first = next(iter(self.providers))
        settings = self.providers[first]
        wants_graph = any(settings.get(key) == "1" for key in ("enable_cuda_graph", "trt_cuda_graph_enable"))
        fake.sessions.append({"path": path, "providers": self.providers, "optimized": options.optimized_model_filepath})
        if wants_graph and not fake.noted:
            raise RuntimeError("This session cannot use the graph capture feature as requested by the user")
        self.real = real.InferenceSession(path, options, providers=[PROCESSOR])
        if first == TENSORRT and fake.loads:
            folder = Path(settings["trt_engine_cache_path"])
            (folder / "TensorrtExecutionProvider_TRTKernel_0_sm89.engine").write_bytes(b"engine")

    def get_providers(self) -> list[str]:
        return [*(self.providers if self.fake.loads else ()), PROCESSOR]

    def get_provider_graph_assignment_info(self) -> Any:
        first = next(iter(self.providers))
        for part in self.real.get_provider_graph_assignment_info():
            nodes = part.get_nodes()
            yield SimpleNamespace(
                ep_name=PROCESSOR if nodes[0].op_type in self.fake.declined else first, get_nodes=lambda nodes=nodes: nodes
            )

    def get_inputs(self) -> Any:
        return self.real.get_inputs()

    def get_outputs(self) -> Any:
        return self.real.get_outputs()

    def io_binding(self) -> Any:
        return self.real.io_binding()

    def run(self, names: Sequence[str], feeds: Any, options: Any) -> Any:
        self.fake.runs.append(options.entries.get("gpu_graph_id", ""))
        return self.real.run(names, feeds)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self.fake.runs.append(options.entries.get("gpu_graph_id", ""))
        self.real.run_with_iobinding(binding._iobinding if hasattr(binding, "run") else binding)


def install(patch: pytest.MonkeyPatch, **changes: Any) -> Fake:
    """From here on the engines for GPUs have this build of ONNX Runtime, and the machine a GPU of compute capability 8.9."""
    from edgediffusion import targets
    from edgediffusion.runtimes.engines import _onnxruntime, onnxruntime

    assert onnxruntime.library is not None  # the processor's engine keeps the real one
    fake = Fake(**changes)
    patch.setattr(_onnxruntime, "library", lambda extra="cpu": fake)
    patch.setattr(targets, "cuda_devices", lambda: (targets.Device("NVIDIA L4", 24.0, "8.9"),))
    return fake
