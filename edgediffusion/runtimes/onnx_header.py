"""What an ONNX file says about itself: opset, inputs, outputs, number formats. Read from its bytes, without the onnx package.

Runtimes have no onnx package, and engine libraries forget what only the file has: the names of axes. The fields of the messages
that are read here, by number, are those of onnx.proto (github.com/onnx/onnx/blob/main/onnx/onnx.proto); the encoding is Protocol
Buffers' (protobuf.dev/programming-guides/encoding). Weights are stepped over, so a file with weights in it costs no more.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgediffusion.bundle import TensorSpec
from edgediffusion.errors import EngineError

# TensorProto.DataType to the names of NumPy, or of targets for what NumPy lacks
_TYPES = {
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
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


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
    for field, value in _fields(data):
        if field == 8 and isinstance(value, memoryview):  # opset_import
            entry = dict(_fields(value))
            if not _text(entry.get(1)):  # the standard domain
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
    for field, value in _fields(data):
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
    for field, value in _fields(data):
        if field == 8:
            name = _text(value)
        elif field == 2 and isinstance(value, int):
            dtype = _TYPES.get(value, str(value))
    return name, dtype


def _spec(data: memoryview) -> TensorSpec:
    value_info = dict(_fields(data))
    name = _text(value_info[1])
    if 2 not in value_info:
        return TensorSpec(name, "", ())
    tensor = dict(_fields(_message(dict(_fields(_message(value_info[2])))[1])))  # TypeProto.tensor_type
    shape: list[int | str] = []
    for index, (_, dimension) in enumerate(f for f in _fields(_message(tensor.get(2, memoryview(b"")))) if f[0] == 1):
        parts = dict(_fields(_message(dimension)))
        size = parts.get(1)
        shape.append(size if isinstance(size, int) else _text(parts.get(2)) or f"{name}.{index}")
    return TensorSpec(name, _numpy_type(name, tensor[1]), tuple(shape))


def _numpy_type(tensor: str, number: int | memoryview) -> str:
    """The type of an input or output, which buffers are to hold."""
    name = _TYPES[int(number)] if isinstance(number, int) else ""
    if name in ("", "bfloat16", "fp8", "int4", "fp4"):
        raise EngineError(f"The tensor '{tensor}' has a type that NumPy lacks", got=name, do="Export the graph with float32 or float16.")
    return name


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of one message: its number, and a number or the bytes of a text, a message or packed numbers."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            length, at = _varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if at + length > end:
            raise ValueError(f"it ends within a field, at byte {at}")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(f"a number of more than 64 bits at byte {at}")


def _message(value: int | memoryview) -> memoryview:
    if not isinstance(value, memoryview):
        raise ValueError("a number where a message should be")
    return value


def _text(value: int | memoryview | None) -> str:
    return bytes(value).decode() if isinstance(value, memoryview) else ""
