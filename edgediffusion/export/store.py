"""Write a safetensors file one tensor at a time; format: https://github.com/huggingface/safetensors#format."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from edgediffusion.export.checkpoint import Stored

CODES = {
    ir.DataType.DOUBLE: "F64",
    ir.DataType.FLOAT: "F32",
    ir.DataType.FLOAT16: "F16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.INT64: "I64",
    ir.DataType.INT32: "I32",
    ir.DataType.INT16: "I16",
    ir.DataType.INT8: "I8",
    ir.DataType.FLOAT8E4M3FN: "F8_E4M3",
    ir.DataType.UINT8: "U8",
    ir.DataType.BOOL: "BOOL",
}


@dataclass(frozen=True)
class Planned:
    """A tensor to be written; ``values`` is called when its turn comes and gives its bytes in row-major order, at once or in blocks."""

    dtype: ir.DataType
    shape: tuple[int, ...]
    values: Callable[[], bytes | Iterable[bytes]]


def planned(tensor: ir.TensorProtocol) -> Planned:
    """A tensor as it is."""
    return Planned(tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes)


def write_tensors(file: Path, tensors: Mapping[str, Planned]) -> dict[str, Stored]:
    """Write ``tensors`` to a new file; returns where each of them lies in it."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # wide ones first keeps all aligned
    spans: dict[str, tuple[int, int]] = {}
    end = 0
    for name in order:
        size = math.prod(tensors[name].shape) * int(tensors[name].dtype.itemsize)
        spans[name] = (end, end + size)
        end += size
    header = json.dumps(
        {n: {"dtype": CODES[tensors[n].dtype], "shape": list(tensors[n].shape), "data_offsets": list(spans[n])} for n in order},
        separators=(",", ":"),
    ).encode()
    header += b" " * (-len(header) % 8)
    with open(file, "wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        for name in order:
            values = tensors[name].values()
            out.writelines((values,) if isinstance(values, bytes) else values)
    base = 8 + len(header)
    return {n: Stored(file, CODES[t.dtype], t.shape, base + spans[n][0], spans[n][1] - spans[n][0]) for n, t in tensors.items()}
