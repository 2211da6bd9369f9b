"""What an ONNX file says about itself: opset, inputs, outputs, number formats. Read from its bytes, without the onnx package.

Runtimes have no onnx package, and engine libraries forget what only the file has: the names of axes. The fields of the messages
that are read here, by number, are those of onnx.proto (github.com/onnx/onnx/blob/main/onnx/onnx.proto). Weights are stepped over, so
a file with weights in it costs no more. ``onnx_nodes`` reads the rest.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path

from edgediffusion.bundle import TensorSpec
from edgediffusion.errors import EngineError
from edgediffusion.runtimes.protobuf import fields, message, text

# TensorProto.DataType to the names of NumPy, or of targets for what NumPy lacks
TYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    16: "bfloat16",
    17: "fp8",
    18: "fp8",
    19: "fp8",
    20: "fp8",
    21: "int4",
    22: "int4",
    23: "fp4",
}
_COMPUTED = {"uint8": "int8"}  # uint8 codes run in the kernels for int8
_FORMATS = ("float32", "float16", "bfloat16", "int8", "int4", "fp8", "fp4")  # formats of arithmetic; an int64 is a shape or an index


@dataclass(frozen=True)
class OnnxHeader:
    """``formats`` are those of weights, inputs and outputs, sorted; axes without a size or a name are called ``<tensor>.<index>``.

    An output need not have a type in the file: its dtype is then empty, and its shape says nothing.
    """

    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    formats: tuple[str, ...]


def read_header(file: Path) -> OnnxHeader:
    """Read an ONNX file as far as its graph's signature.

    Raises:
        EngineError: the file is missing, or is no ONNX file.
    """
    try:
        with open(file, "rb") as stream:
            return _model(memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)))
    except (OSError, ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise EngineError(f"'{file.parent.name}/{file.name}' is missing or is no ONNX file", got=problem) from None


def _model(data: memoryview) -> OnnxHeader:
    opset, graph = 0, None
    for field, value in fields(data):
        if field == 8 and isinstance(value, memoryview):  # opset_import
            entry = dict(fields(value))
            if not text(entry.get(1)):  # the standard domain
                opset = int(entry.get(2, 0))
        elif field == 7 and isinstance(value, memoryview):
            graph = _graph(value)
    if graph is None or not opset:
        raise ValueError("it has no graph, or no opset")
    inputs, outputs, weights = graph
    found = {_COMPUTED.get(name, name) for name in (*weights, *(spec.dtype for spec in (*inputs, *outputs)))}
    return OnnxHeader(opset, inputs, outputs, tuple(sorted(found & set(_FORMATS))))


def _graph(data: memoryview) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...], set[str]]:
    inputs, outputs, weights = [], [], {}
    for field, value in fields(data):
        if not isinstance(value, memoryview):
            continue
        if field == 5:  # initializer
            name, dtype = _tensor(value)
            weights[name] = dtype
        elif field == 11:
            inputs.append(_spec(value))
        elif field == 12:
            outputs.append(_spec(value))
    return tuple(s for s in inputs if s.name not in weights), tuple(outputs), set(weights.values())


def _tensor(data: memoryview) -> tuple[str, str]:
    name, dtype = "", ""
    for field, value in fields(data):
        if field == 8:
            name = text(value)
        elif field == 2 and isinstance(value, int):
            dtype = TYPES.get(value, str(value))
    return name, dtype


def _spec(data: memoryview) -> TensorSpec:
    value_info = dict(fields(data))
    name = text(value_info[1])
    if 2 not in value_info:
        return TensorSpec(name, "", ())
    tensor = dict(fields(message(dict(fields(message(value_info[2])))[1])))  # TypeProto.tensor_type
    shape: list[int | str] = []
    for index, (_, dimension) in enumerate(f for f in fields(message(tensor.get(2, memoryview(b"")))) if f[0] == 1):
        parts = dict(fields(message(dimension)))
        size = parts.get(1)
        shape.append(size if isinstance(size, int) else text(parts.get(2)) or f"{name}.{index}")
    return TensorSpec(name, _numpy_type(name, tensor[1]), tuple(shape))


def _numpy_type(tensor: str, number: int | memoryview) -> str:
    """The type of an input or output, which buffers are to hold."""
    name = TYPES[int(number)] if isinstance(number, int) else ""
    if name in ("", "bfloat16", "fp8", "int4", "fp4"):
        raise EngineError(f"The tensor '{tensor}' has a type that NumPy lacks", got=name, do="Export the graph with float32 or float16.")
    return name
