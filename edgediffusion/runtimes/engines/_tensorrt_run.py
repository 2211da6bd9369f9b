"""Running an engine of TensorRT: its buffers bound once, its kernels launched as one CUDA graph."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from edgediffusion.bundle import TensorSpec
from edgediffusion.errors import EngineError
from edgediffusion.runtimes.engines import NOT_SHARED, allocate, resolve
from edgediffusion.runtimes.engines._cuda import Cuda, cuda
from edgediffusion.runtimes.engines._described import Described
from edgediffusion.runtimes.sizes import check_sizes

_REBUILD = "Build it anew with: edgediffusion build BUNDLE --target NAME -o NEW"


def open_engine(trt: Any, log: Any, file: Path, title: str) -> Any:
    """The engine of a file, loaded.

    Raises:
        EngineError: the library says that it is not valid here, or cannot load it.
    """
    runtime = trt.Runtime(log)
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if reasons := _invalidity(trt, runtime, data, log):
            raise EngineError(f"{title} says that '{file.name}' is not valid here", got=reasons, do=_REBUILD)
        engine = runtime.deserialize_cuda_engine(data[:])
    if engine is None:
        raise EngineError(f"{title} could not load '{file.parent.name}/{file.name}'", got=log.told() or "no reason given", do=_REBUILD)
    return engine


def invalidity(trt: Any, log: Any, file: Path) -> str:
    """Why the library would not load an engine here, as far as the file's header tells; "" where it would, or has no such call."""
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _invalidity(trt, trt.Runtime(log), data, log)


def _invalidity(trt: Any, runtime: Any, data: mmap.mmap, log: Any) -> str:
    if not hasattr(runtime, "get_engine_validity"):  # TensorRT for RTX has it: it reads the header alone, before anything is loaded
        return ""
    validity, reasons = runtime.get_engine_validity(data[: runtime.engine_header_size])
    return _reasons(trt, reasons, log) if validity == trt.EngineValidity.INVALID else ""


def _reasons(trt: Any, bits: int, log: Any) -> str:
    """Names of the bits that are set: VERSION_MISMATCH, UNSUPPORTED_CC, OLD_CUDA_DRIVER, ..."""
    known = getattr(trt, "EngineInvalidityDiagnostics", None)
    members = getattr(known, "__members__", {})
    named = [name for name, value in members.items() if int(value) & int(bits)]
    return ", ".join(named) or log.told() or "no reason given"


class TensorRTSession:
    def __init__(self, engine: Any, known: Described, *, extra: str, title: str, keep: object):
        """``keep`` lives as long as the engine does: the library calls its logger to the end."""
        self.inputs, self.outputs = known.inputs, known.outputs
        self._engine, self._known, self._title, self._keep = engine, known, title, keep
        self._cuda = cuda(extra)
        names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        if names != {spec.name for spec in (*known.inputs, *known.outputs)}:
            raise EngineError("The engine has other tensors than what is written beside it", got=", ".join(sorted(names)), do=_REBUILD)

    def bind(self, axes: Mapping[str, int], shared: Mapping[str, np.ndarray] = NOT_SHARED) -> TensorRTBinding:
        """Buffers in pinned memory, each with its twin on the GPU; ``shared`` arrays are copied like the others.

        Raises:
            EngineError: ``axes`` lacks an axis of an input or has a size out of the engine's ranges, a shared array does not fit, or
            the GPU has too little memory.
        """
        check_sizes(axes, self._known.ranges, self._title)
        context = self._engine.create_execution_context()
        if context is None:
            raise EngineError(f"{self._title} could not prepare the engine to run", got="the GPU's memory may be full")
        for spec in self.inputs:
            shape = shared[spec.name].shape if spec.name in shared else resolve(spec, axes)
            if not context.set_input_shape(spec.name, shape):
                raise EngineError(f"{self._title} does not take this shape of '{spec.name}'", got=shape)
        known = dict(axes)
        for spec in self.outputs:  # an axis that only outputs have: the engine knows it once its inputs have shapes
            found = tuple(context.get_tensor_shape(spec.name))
            known.update({axis: size for axis, size in zip(spec.shape, found, strict=True) if isinstance(axis, str)})
        host = {s.name: shared[s.name] if s.name in shared else self._buffer(s, known) for s in (*self.inputs, *self.outputs)}
        inputs, outputs = (allocate(specs, known, host) for specs in (self.inputs, self.outputs))
        return TensorRTBinding(context, self._cuda, inputs, outputs, self._title)

    def _buffer(self, spec: TensorSpec, axes: Mapping[str, int]) -> np.ndarray:
        return self._cuda.host_array(resolve(spec, axes), spec.dtype)


class TensorRTBinding:
    """The first run launches kernels one by one, which is when the library makes its lazy allocations; the second is noted down as a CUDA
    graph, and from then on one call launches them all. Where the library says that it cannot be noted down, it never is."""

    def __init__(self, context: Any, device: Cuda, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray], title: str):
        self.inputs, self.outputs = inputs, outputs
        self._context, self._cuda, self._title = context, device, title
        self._graph: Any = None
        self._warm = False
        self._memory = {name: device.device_memory(array.nbytes, self) for name, array in (*inputs.items(), *outputs.items())}
        for name, pointer in self._memory.items():
            if not context.set_tensor_address(name, pointer):
                raise EngineError(f"{title} does not take the buffer of '{name}'")

    def run(self) -> None:
        for name, array in self.inputs.items():
            self._cuda.to_device(self._memory[name], array)
        if self._graph is None and self._warm and self._capturable():
            self._graph = self._noted_down()
        if self._graph is None:
            self._enqueue()
        else:
            self._cuda.launch(self._graph)
        for name, array in self.outputs.items():
            self._cuda.to_host(array, self._memory[name])
        self._cuda.wait()
        self._warm = True

    def _noted_down(self) -> Any:
        self._cuda.capture()
        try:
            self._enqueue()
        except EngineError:
            with suppress(EngineError):
                self._cuda.captured()  # the stream must not stay in capture
            raise
        return self._cuda.captured()

    def _capturable(self) -> bool:
        """TensorRT for RTX may still be choosing kernels for a shape; TensorRT does not say, and can."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return True if ask is None else bool(ask(self._cuda.stream))

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._cuda.stream):
            raise EngineError(f"{self._title} could not run the engine", do="The sizes or the GPU's memory may not suffice.")
