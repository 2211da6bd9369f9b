"""The nodes of an ONNX file and the sizes of what it stores, read from its bytes; weights are stepped over, in the file or beside it.

The fields of the messages that are read here, by number, are those of onnx.proto
(github.com/onnx/onnx/blob/main/onnx/onnx.proto). Calls of the file's own functions are replaced by the nodes of their bodies.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from edgediffusion.errors import EngineError
from edgediffusion.runtimes.onnx_header import TYPES
from edgediffusion.runtimes.protobuf import fields, integers, message, signed, text

_BITS = {"float64": 64, "int64": 64, "float32": 32, "int32": 32, "float16": 16, "bfloat16": 16, "int16": 16, "uint16": 16}
_BITS |= {"int8": 8, "uint8": 8, "fp8": 8, "bool": 8, "int4": 4, "fp4": 4}
_SMALL = 256  # entries; what shapes are computed from is far smaller
_READ = {"float32": "<f4", "int64": "<i8", "int32": "<i4", "float64": "<f8", "bool": "?"}
_ENTRIES = {4: ("float32", "f"), 10: ("float64", "d")}  # repeated fields of a TensorProto that hold its entries, packed


@dataclass(frozen=True)
class Stored:
    """A tensor of the file. ``data`` is there where it has few entries, of a type that shapes and factors have."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray | None = None


Attribute = int | float | str | tuple[int, ...] | tuple[float, ...] | tuple[str, ...] | Stored


@dataclass(frozen=True)
class Declared:
    """Type and shape of a value, as far as the file states them; an axis without a size is its name, or empty."""

    dtype: str
    shape: tuple[int | str, ...] | None


@dataclass(frozen=True)
class Node:
    operator: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    domain: str = ""

    def integer(self, name: str, default: int) -> int:
        value = self.attributes.get(name, default)
        return value if isinstance(value, int) else default

    def integers(self, name: str) -> tuple[int, ...] | None:
        value = self.attributes.get(name)
        return tuple(int(entry) for entry in value) if isinstance(value, tuple) else None

    def word(self, name: str, default: str = "") -> str:
        value = self.attributes.get(name, default)
        return value if isinstance(value, str) else default


@dataclass(frozen=True)
class OnnxGraph:
    """``nodes`` are in the order of the file, in which each comes after those that it reads from."""

    inputs: Mapping[str, Declared]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    stored: Mapping[str, Stored]
    declared: Mapping[str, Declared]


@dataclass(frozen=True)
class _Function:
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]


def size_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Of a tensor; two entries of 4 bits share a byte."""
    return -(-math.prod(shape) * _BITS.get(dtype, 8) // 8)


def read_nodes(file: Path) -> OnnxGraph:
    """Read the graph of an ONNX file.

    Raises:
        EngineError: the file is missing, or is no ONNX file.
    """
    try:
        with open(file, "rb") as stream:
            return _model(memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)))
    except (OSError, ValueError, IndexError, KeyError, UnicodeDecodeError, struct.error) as error:
        problem = f"{type(error).__name__}: {error}"
        raise EngineError(f"'{file.parent.name}/{file.name}' is missing or is no ONNX file", got=problem) from None


def _model(data: memoryview) -> OnnxGraph:
    graph, functions = None, {}
    for number, value in fields(data):
        if number == 7:
            graph = message(value)
        elif number == 25:
            key, function = _function(message(value))
            functions[key] = function
    if graph is None:
        raise ValueError("it has no graph")
    return _graph(graph, functions)


def _graph(data: memoryview, functions: Mapping[tuple[str, str], _Function]) -> OnnxGraph:
    nodes: list[Node] = []
    stored: dict[str, Stored] = {}
    values: dict[int, dict[str, Declared]] = {11: {}, 12: {}, 13: {}}  # input, output, value_info
    for number, value in fields(data):
        if number == 1:
            nodes += _inlined(_node(message(value)), functions, f"{len(nodes)}/")
        elif number == 5:
            name, tensor = _tensor(message(value))
            stored[name] = tensor
        elif number in values:
            name, declared = _declared(message(value))
            values[number][name] = declared
    inputs = {name: declared for name, declared in values[11].items() if name not in stored}
    return OnnxGraph(inputs, tuple(values[12]), _without_sequences(nodes, stored), stored, {**values[13], **values[12], **inputs})


def _without_sequences(nodes: list[Node], stored: Mapping[str, Stored]) -> tuple[Node, ...]:
    """``SplitToSequence`` as ``Split``, and ``SequenceAt`` as the part that it takes, where all of them say which one."""
    taken: dict[str, list[int]] = {}
    for node in nodes:
        at = stored.get(node.inputs[1]) if node.operator == "SequenceAt" else None
        if at is not None and at.data is not None:
            taken.setdefault(node.inputs[0], []).append(int(at.data.item()))
    parts: dict[str, list[str]] = {}
    found = []
    for node in nodes:
        if node.operator == "SplitToSequence" and min(taken.get(node.outputs[0], [-1])) >= 0:
            parts[node.outputs[0]] = [f"{node.outputs[0]}/{i}" for i in range(max(taken[node.outputs[0]]) + 1)]
            node = replace(node, operator="Split", outputs=tuple(parts[node.outputs[0]]))
        elif node.operator == "SequenceAt" and node.inputs[0] in parts and node.inputs[1] in stored:
            at = stored[node.inputs[1]]
            node = replace(node, operator="Identity", inputs=(parts[node.inputs[0]][int(at.data.item())],)) if at.data is not None else node
        found.append(node)
    return tuple(found)


def _inlined(node: Node, functions: Mapping[tuple[str, str], _Function], prefix: str) -> list[Node]:
    """The node, or where it calls a function of the file the nodes of that: inner values get names of their own."""
    function = functions.get((node.domain, node.operator))
    if function is None:
        return [node]
    outer = dict(zip(function.inputs, node.inputs, strict=False))  # optional ones may be left out
    outer |= dict(zip(function.outputs, node.outputs, strict=False))
    found: list[Node] = []
    for inner in function.nodes:
        renamed = [tuple(outer.get(n, n and prefix + n) for n in names) for names in (inner.inputs, inner.outputs)]
        found += _inlined(
            replace(inner, name=prefix + inner.name, inputs=renamed[0], outputs=renamed[1]), functions, f"{prefix}{len(found)}/"
        )
    return found


def _function(data: memoryview) -> tuple[tuple[str, str], _Function]:
    name = domain = ""
    inputs, outputs, nodes = [], [], []
    for number, value in fields(data):
        if number == 1:
            name = text(value)
        elif number == 4:
            inputs.append(text(value))
        elif number == 5:
            outputs.append(text(value))
        elif number == 7:
            nodes.append(_node(message(value)))
        elif number == 10:
            domain = text(value)
    return (domain, name), _Function(tuple(inputs), tuple(outputs), tuple(nodes))


def _node(data: memoryview) -> Node:
    inputs, outputs, attributes = [], [], {}
    name = operator = domain = ""
    for number, value in fields(data):
        if number == 1:
            inputs.append(text(value))
        elif number == 2:
            outputs.append(text(value))
        elif number == 3:
            name = text(value)
        elif number == 4:
            operator = text(value)
        elif number == 5:
            attributes.update(_attribute(message(value)))
        elif number == 7:
            domain = text(value)
    return Node(operator, name, tuple(inputs), tuple(outputs), attributes, domain)


def _attribute(data: memoryview) -> dict[str, Attribute]:
    """Its value by its name; a graph in an attribute, or one that a function was to be given, is left out."""
    name, kind = "", 0
    single: Attribute | None = None
    many: dict[int, list[Attribute]] = {7: [], 8: [], 9: []}  # floats, ints, strings
    for number, value in fields(data):
        if number == 1:
            name = text(value)
        elif number == 20 and isinstance(value, int):
            kind = value
        elif number == 2:
            single = float(struct.unpack("<f", message(value))[0])
        elif number == 3 and isinstance(value, int):
            single = signed(value)
        elif number == 4:
            single = text(value)
        elif number == 5:
            single = _tensor(message(value))[1]
        elif number == 7:
            many[7] += struct.unpack(f"<{len(message(value)) // 4}f", message(value))
        elif number == 8:
            many[8] += integers(value)
        elif number == 9:
            many[9].append(text(value))
    if kind in (6, 7, 8):  # FLOATS, INTS, STRINGS
        return {name: tuple(many[kind + 1])}  # type: ignore[dict-item]
    return {} if single is None else {name: single}


def _tensor(data: memoryview) -> tuple[str, Stored]:
    name = dtype = ""
    shape: list[int] = []
    raw: memoryview | None = None
    entries: list[float] = []
    for number, value in fields(data):
        if number == 1:
            shape += integers(value)
        elif number == 2 and isinstance(value, int):
            dtype = TYPES.get(value, str(value))
        elif number == 8:
            name = text(value)
        elif number == 9:
            raw = message(value)
        elif number in (5, 7) and math.prod(shape) <= _SMALL:  # int32_data, int64_data
            entries += integers(value)
        elif number in _ENTRIES and isinstance(value, memoryview) and math.prod(shape) <= _SMALL:
            letter = _ENTRIES[number][1]
            entries += struct.unpack(f"<{len(value) // struct.calcsize(letter)}{letter}", value)
    return name, Stored(dtype, tuple(shape), _entries(dtype, tuple(shape), raw, entries))


def _entries(dtype: str, shape: tuple[int, ...], raw: memoryview | None, entries: list[float]) -> np.ndarray | None:
    count = math.prod(shape)
    if dtype not in _READ or count > _SMALL:
        return None
    if raw is not None and len(raw) == size_bytes(dtype, shape):
        return np.frombuffer(raw, _READ[dtype]).reshape(shape).copy()
    return np.array(entries, _READ[dtype]).reshape(shape) if len(entries) == count else None


def _declared(data: memoryview) -> tuple[str, Declared]:
    value_info = dict(fields(data))
    name = text(value_info[1])
    if 2 not in value_info:
        return name, Declared("", None)
    kinds = dict(fields(message(value_info[2])))
    if 1 not in kinds:  # no tensor
        return name, Declared("", None)
    tensor = dict(fields(message(kinds[1])))
    dtype = TYPES.get(int(tensor.get(1, 0)), "") if isinstance(tensor.get(1, 0), int) else ""
    if 2 not in tensor:
        return name, Declared(dtype, None)
    shape: list[int | str] = []
    for number, dimension in fields(message(tensor[2])):
        if number == 1:
            parts = dict(fields(message(dimension)))
            size = parts.get(1)
            shape.append(signed(size) if isinstance(size, int) else text(parts.get(2)))
    return name, Declared(dtype, tuple(shape))
