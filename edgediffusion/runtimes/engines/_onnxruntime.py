"""What the engines of ONNX Runtime share: the library, options of a session, its tensors, its exceptions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from edgediffusion.bundle import TensorSpec
from edgediffusion.errors import EngineError
from edgediffusion.registry import require

PURPOSE = "Running with ONNX Runtime"
_ERRORS_ONLY = 3
_SMALLEST_OUTSIDE_BYTES = 1024
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


def library(extra: str = "cpu") -> Any:
    return require("onnxruntime", extra=extra, purpose=PURPOSE)


def session_options(threads: int | None, *, optimize: bool) -> Any:
    """``threads`` is by default the cores this process may use."""
    options = library().SessionOptions()
    level = library().GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads or _default_threads()
    options.log_severity_level = _ERRORS_ONLY
    # Every session has threads of its own. After a call they go on waiting for work by spinning, on the cores that the next graph's threads
    # need: with caches, where graphs take turns, a loop took up to two thirds as long again.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def keep_optimized(options: Any, engine: Any) -> None:
    """Have the session write the graph as it is optimized, to ``engine``, and its weights to ``engine`` + ``.data``."""
    options.optimized_model_filepath = str(engine)
    prefix = "session.optimized_model_external_initializers_"
    options.add_session_config_entry(prefix + "file_name", engine.name + ".data")
    options.add_session_config_entry(prefix + "min_size_in_bytes", str(_SMALLEST_OUTSIDE_BYTES))


def spec_of(argument: Any) -> TensorSpec:
    if argument.type not in _DTYPES:
        raise EngineError(f"The tensor '{argument.name}' has a type that NumPy lacks", got=argument.type, allowed=", ".join(_DTYPES))
    shape = tuple(f"{argument.name}.{i}" if size is None else size for i, size in enumerate(argument.shape))
    return TensorSpec(argument.name, _DTYPES[argument.type], shape)


@contextmanager
def mapped(wrong: str) -> Iterator[None]:
    """Every exception that ONNX Runtime raises becomes an EngineError.

    Its own classes have no base in common, and it also raises the plain ones below for bad feeds and types.
    """
    expected: tuple[type[Exception], ...] = (RuntimeError, ValueError, TypeError, *_native_errors())
    try:
        yield
    except expected as error:
        raise EngineError(wrong, got=f"{type(error).__name__}: {error}") from error


def _default_threads() -> int:
    """0, ONNX Runtime's own choice, where this process may use every core; else the number that it may use.

    With its own choice it also binds each thread to a core. Threads that are not bound were seen to share one core
    while the other was idle, which made a step of the reference UNet between one and two times as long. But it counts
    the machine's cores, also where a container or ``taskset`` leaves fewer.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return 0 if cores in (0, os.cpu_count()) else cores


@cache
def _native_errors() -> tuple[type[Exception], ...]:
    native = vars(require("onnxruntime.capi.onnxruntime_pybind11_state", extra="cpu", purpose=PURPOSE))
    return tuple(value for value in native.values() if isinstance(value, type) and issubclass(value, Exception))
