"""TensorRT's and CUDA's Python modules as far as running an engine takes them: an engine is a Python function over NumPy arrays.

"Memory of the GPU" is ordinary memory at real addresses; a stream does what it is told at once, or notes it down while it is captured.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Mapping
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

Function = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


class FakeCuda(ModuleType):
    """``cuda.bindings.runtime``: every function returns a status and what else there is; ``calls`` are their names in order."""

    class cudaError_t(Enum):
        cudaSuccess = 0
        cudaErrorMemoryAllocation = 2

    class cudaMemcpyKind(Enum):
        cudaMemcpyHostToDevice = 1
        cudaMemcpyDeviceToHost = 2

    class cudaStreamCaptureMode(Enum):
        cudaStreamCaptureModeThreadLocal = 1

    def __init__(self, limit_bytes: int = 1 << 30) -> None:
        super().__init__("cuda.bindings.runtime")
        self.calls: list[str] = []
        self.memory: dict[int, Any] = {}
        self.captured: list[Callable[[], None]] | None = None
        self.limit_bytes = limit_bytes

    def do(self, work: Callable[[], None]) -> None:
        if self.captured is None:
            work()
        else:
            self.captured.append(work)

    def _allocate(self, size: int) -> tuple[Any, ...]:
        if size > self.limit_bytes:
            return (self.cudaError_t.cudaErrorMemoryAllocation, 0)
        block = ctypes.create_string_buffer(b"\xff" * size, size)  # not zeros: nothing may count on that
        self.memory[ctypes.addressof(block)] = block
        return (self.cudaError_t.cudaSuccess, ctypes.addressof(block))

    def _free(self, pointer: int) -> tuple[Any, ...]:
        del self.memory[pointer]
        return (self.cudaError_t.cudaSuccess,)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cuda"):
            raise AttributeError(name)
        found = getattr(self, "_" + name[4:].lower())

        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            result = found(*arguments)
            return (self.cudaError_t.cudaSuccess,) if result is None else result

        return call

    def _streamcreate(self) -> tuple[Any, ...]:
        return (self.cudaError_t.cudaSuccess, 7)

    def _streamsynchronize(self, stream: int) -> None:
        assert stream == 7
        assert self.captured is None

    def _hostalloc(self, size: int, flags: int) -> tuple[Any, ...]:
        return self._allocate(size)

    def _malloc(self, size: int) -> tuple[Any, ...]:
        return self._allocate(size)

    _freehost = _free
    _free_device = _free

    def _memcpyasync(self, to: int, source: int, size: int, kind: Enum, stream: int) -> None:
        assert kind in self.cudaMemcpyKind
        self.do(lambda: ctypes.memmove(to, source, size) and None)

    def _streambegincapture(self, stream: int, mode: Enum) -> None:
        self.captured = []

    def _streamendcapture(self, stream: int) -> tuple[Any, ...]:
        graph, self.captured = self.captured, None
        return (self.cudaError_t.cudaSuccess, graph)

    def _graphinstantiate(self, graph: Any, flags: int) -> tuple[Any, ...]:
        return (self.cudaError_t.cudaSuccess, list(graph))

    def _graphdestroy(self, graph: Any) -> None:
        graph.clear()

    def _graphlaunch(self, graph: Any, stream: int) -> None:
        for work in graph:
            work()

    def _geterrorstring(self, status: Enum) -> tuple[Any, ...]:
        return (self.cudaError_t.cudaSuccess, f"out of memory ({status.name})".encode())


class FakeTensorRT(ModuleType):
    """A module that loads "engines" whose bytes begin with ``engine``; ``function`` is what they all compute."""

    class ILogger:
        class Severity:
            ERROR = 1

    __version__ = "10.3.0"

    def __init__(self, name: str, cuda: FakeCuda, shapes: Mapping[str, tuple[int, ...]], function: Function) -> None:
        super().__init__(name)
        self.cuda, self.shapes, self.function = cuda, shapes, function
        self.enqueued = 0
        self.Runtime = lambda log: FakeRuntime(self, log)


class FakeRuntime:
    def __init__(self, library: FakeTensorRT, log: Any):
        self.library, self.log = library, log

    def deserialize_cuda_engine(self, data: bytes) -> Any:
        if not data.startswith(b"engine"):
            self.log.log(1, "Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed.")
            self.log.log(1, "and something that follows from it")
            return None
        return FakeEngine(self.library)


class FakeEngine:
    def __init__(self, library: FakeTensorRT):
        self.library = library
        self.num_io_tensors = len(library.shapes)

    def get_tensor_name(self, index: int) -> str:
        return list(self.library.shapes)[index]

    def create_execution_context(self) -> Any:
        return FakeContext(self.library)


class FakeContext:
    """Shapes of inputs are set; those of outputs follow from ``shapes``, whose -1 is the first axis of ``sample``."""

    def __init__(self, library: FakeTensorRT):
        self.library = library
        self.given: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.given[name] = tuple(shape)
        return len(shape) == len(self.library.shapes[name])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        rows, *_, height, width = self.given.get("sample", self.given.get("latent_sample"))  # type: ignore[misc]
        return tuple({-1: rows, -2: height, -3: width, -4: 2 * height, -5: 2 * width}.get(n, n) for n in self.library.shapes[name])

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self.addresses[name] = pointer
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.library.enqueued += 1

        def work() -> None:
            arrays = {name: self._array(name) for name in self.library.shapes}
            for name, value in self.library.function(arrays).items():
                arrays[name][...] = value

        self.library.cuda.do(work)
        return True

    def _array(self, name: str) -> np.ndarray:
        shape = self.given.get(name) or self.get_tensor_shape(name)
        if name == "timestep":
            shape = self.given[name]
        count = int(np.prod(shape))
        return np.frombuffer((ctypes.c_float * count).from_address(self.addresses[name]), np.float32).reshape(shape)


def install(
    patch: pytest.MonkeyPatch, name: str, shapes: Mapping[str, tuple[int, ...]], function: Function
) -> tuple[FakeTensorRT, FakeCuda]:
    """From here on importing TensorRT and cuda-python gives the fakes, and the machine has a GPU of compute capability 8.7."""
    from edgediffusion import targets
    from edgediffusion.runtimes.engines import _cuda

    cuda = FakeCuda()
    library = FakeTensorRT(name, cuda, shapes, function)
    patch.setitem(sys.modules, name, library)
    patch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    patch.setitem(sys.modules, "cuda.bindings", ModuleType("cuda.bindings"))
    patch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    patch.setattr(targets, "cuda_devices", lambda: (targets.Device("Orin", 7.4, "8.7"),))
    _cuda.cuda.cache_clear()
    return library, cuda


class FakeBuilding:
    """What ``FakeTensorRT`` needs to build too, as TensorRT does on the GPU that is here: ``seen`` keeps what it was told."""

    def __init__(self, library: FakeTensorRT):
        self.seen: dict[str, Any] = {"shapes": {}}
        library.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=3)
        library.IProgressMonitor = type("IProgressMonitor", (), {"__init__": lambda self: None})
        library.Builder = lambda log: self
        library.OnnxParser = lambda network, log: SimpleNamespace(parse_from_file=lambda file: True)

    def create_network(self, flags: int) -> Any:
        self.seen["flags"] = flags
        return SimpleNamespace(num_layers=5)

    def create_optimization_profile(self) -> Any:
        return SimpleNamespace(set_shape=lambda name, *shapes: self.seen["shapes"].update({name: shapes}))

    def create_builder_config(self) -> Any:
        kept: dict[str, Any] = {}

        def set_timing_cache(cache: bytes, ignore_mismatch: bool) -> None:
            kept["cache"] = cache
            assert not ignore_mismatch

        return SimpleNamespace(
            add_optimization_profile=lambda profile: None,
            progress_monitor=None,
            create_timing_cache=lambda data: data,
            set_timing_cache=set_timing_cache,
            get_timing_cache=lambda: SimpleNamespace(serialize=lambda: kept["cache"] + b"one kernel, "),
        )

    def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
        monitor = config.progress_monitor
        monitor.phase_start("Building engine", None, 100)
        for step in range(100):
            if not monitor.step_complete("Building engine", step):
                return None
            time.sleep(0.002)
        monitor.phase_finish("Building engine")
        return b"engine that was built"
