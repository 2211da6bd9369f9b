"""The little of CUDA's runtime that running an engine takes, through cuda-python: memory, copies, one stream, graphs."""

from __future__ import annotations

import ctypes
import weakref
from functools import cache
from typing import Any

import numpy as np

from edgediffusion.errors import EngineError
from edgediffusion.registry import require

_DEFAULT = 0  # cudaHostAllocDefault, cudaStreamDefault, and no flag of a graph


class Cuda:
    """One stream, on which everything happens in the order in which it is asked for."""

    def __init__(self, extra: str):
        """
        Raises:
            MissingExtra: cuda-python is not installed. EngineError: there is no GPU or no driver.
        """
        self._runtime = require("cuda.bindings.runtime", extra=extra, purpose="Running on an NVIDIA GPU")
        self.stream = int(self("cudaStreamCreate"))

    def __call__(self, function: str, *arguments: Any) -> Any:
        """Call a function of the runtime; its result without the status.

        Raises:
            EngineError: the status is not success.
        """
        status, *values = getattr(self._runtime, function)(*arguments)
        if status != self._runtime.cudaError_t.cudaSuccess:
            reason = self._runtime.cudaGetErrorString(status)[1]
            raise EngineError(f"CUDA refused {function}", got=reason.decode() if isinstance(reason, bytes) else reason)
        return values[0] if values else None

    def host_array(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Zeros in memory that the GPU copies from and to without another copy (pinned); it is freed with the array."""
        kind = np.dtype(dtype)
        count = int(np.prod(shape, dtype=np.int64))
        pointer = int(self("cudaHostAlloc", max(count * kind.itemsize, 1), _DEFAULT))
        block = (ctypes.c_byte * (count * kind.itemsize)).from_address(pointer)
        weakref.finalize(block, self._free, "cudaFreeHost", pointer)
        array: np.ndarray = np.frombuffer(memoryview(block), dtype=kind, count=count).reshape(shape)
        array[...] = 0
        return array

    def device_memory(self, bytes_: int, owner: object) -> int:
        """The address of memory on the GPU, which is freed with ``owner``."""
        pointer = int(self("cudaMalloc", max(bytes_, 1)))
        weakref.finalize(owner, self._free, "cudaFree", pointer)
        return pointer

    def to_device(self, pointer: int, array: np.ndarray) -> None:
        self("cudaMemcpyAsync", pointer, array.ctypes.data, array.nbytes, self._kind("cudaMemcpyHostToDevice"), self.stream)

    def to_host(self, array: np.ndarray, pointer: int) -> None:
        self("cudaMemcpyAsync", array.ctypes.data, pointer, array.nbytes, self._kind("cudaMemcpyDeviceToHost"), self.stream)

    def wait(self) -> None:
        self("cudaStreamSynchronize", self.stream)

    def capture(self) -> None:
        """From here on what is put on the stream is noted down, and not run."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self("cudaStreamBeginCapture", self.stream, mode)

    def captured(self) -> Any:
        """What was noted down, as a graph that can be launched."""
        graph = self("cudaStreamEndCapture", self.stream)
        try:
            return self("cudaGraphInstantiate", graph, _DEFAULT)
        finally:
            self("cudaGraphDestroy", graph)

    def launch(self, graph: Any) -> None:
        self("cudaGraphLaunch", graph, self.stream)

    def _kind(self, name: str) -> Any:
        return getattr(self._runtime.cudaMemcpyKind, name)

    def _free(self, function: str, pointer: int) -> None:
        getattr(self._runtime, function)(pointer)  # its status is of no use to anybody by now


@cache
def cuda(extra: str) -> Cuda:
    """One for the process: engines of a pipeline follow each other on one stream."""
    return Cuda(extra)
