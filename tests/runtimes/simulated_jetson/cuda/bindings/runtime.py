"""CUDA's runtime, as far as running an engine takes it: the GPU's memory is ordinary memory, a stream does what it is told at once, or
notes it down while it is captured."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import Enum
from typing import Any

memory: dict[int, Any] = {}
noted: list[Callable[[], None]] | None = None


class cudaError_t(Enum):
    cudaSuccess = 0


class cudaMemcpyKind(Enum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaStreamCaptureMode(Enum):
    cudaStreamCaptureModeThreadLocal = 1


DONE = cudaError_t.cudaSuccess


def do(work: Callable[[], None]) -> None:
    work() if noted is None else noted.append(work)


def cudaStreamCreate() -> Any:
    return DONE, 7


def cudaHostAlloc(size: int, flags: int) -> Any:
    block = ctypes.create_string_buffer(size)
    memory[ctypes.addressof(block)] = block
    return DONE, ctypes.addressof(block)


def cudaMalloc(size: int) -> Any:
    return cudaHostAlloc(size, 0)


def cudaFree(pointer: int) -> Any:
    del memory[pointer]
    return (DONE,)


cudaFreeHost = cudaFree


def cudaMemcpyAsync(to: int, source: int, size: int, kind: Enum, stream: int) -> Any:
    do(lambda: ctypes.memmove(to, source, size) and None)
    return (DONE,)


def cudaStreamSynchronize(stream: int) -> Any:
    return (DONE,)


def cudaStreamBeginCapture(stream: int, mode: Enum) -> Any:
    global noted
    noted = []
    return (DONE,)


def cudaStreamEndCapture(stream: int) -> Any:
    global noted
    graph, noted = noted, None
    return DONE, graph


def cudaGraphInstantiate(graph: Any, flags: int) -> Any:
    return DONE, list(graph)


def cudaGraphDestroy(graph: Any) -> Any:
    return (DONE,)


def cudaGraphLaunch(graph: Any, stream: int) -> Any:
    for work in graph:
        work()
    return (DONE,)
