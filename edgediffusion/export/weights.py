"""The weights of a graph: in the source's own files where they can be, in a new file where they must change.

For each tensor one of three cases:

1. it is stored in the dtype of the graph: the initializer points to it in the linked or copied file;
2. it is stored in a narrower float: the same, with a Cast node behind, which an engine folds when it loads;
3. it is stored in a wider float, or a LoRA changes it: it is written into a new file of the bundle, a block of rows at a time.

So a graph may have several files. But if any tensor is stored in a wider float all of them go to the new file, so that no file
is linked for a rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import ml_dtypes
import numpy as np
import onnx_ir as ir

from edgediffusion.errors import SourceError
from edgediffusion.export.checkpoint import Stored
from edgediffusion.export.lora import LowRank
from edgediffusion.export.store import CODES, Planned, write_tensors
from edgediffusion.files import link_or_copy

CONVERTED = "weights.safetensors"
Changes = Mapping[str, Sequence[LowRank]]
UNCHANGED: Changes = MappingProxyType({})
_BLOCK_BYTES = 1 << 24
_DTYPES = {code: dtype for dtype, code in CODES.items()}
_FLOATS = {ir.DataType.BFLOAT16: 0, ir.DataType.FLOAT16: 1, ir.DataType.FLOAT: 2, ir.DataType.DOUBLE: 3}


def attach(
    model: ir.Model, stored: Mapping[str, Stored], folder: Path, *, link: bool, placed: dict[Path, Path], changes: Changes = UNCHANGED
) -> None:
    """Give the initializers named in ``stored`` their values, in files that lie in ``folder``, the graph's own.

    ``placed`` remembers where in the bundle a source file already is: a second graph with the same weights links to it.
    ``changes`` are added to the weights that they are named after.

    Raises:
        SourceError: a weight has no place in the dtype of the graph.
    """
    weights = {name: model.graph.initializers[name] for name in sorted(stored)}
    dtypes = {name: _dtype(value) for name, value in weights.items()}
    planned = {n: _planned(n, stored[n], dtypes[n], changes.get(n, ())) for n in _anew(stored, dtypes, changes)}
    here = {**stored, **(write_tensors(folder / CONVERTED, planned) if planned else {})}
    for file in {stored[name].file for name in weights if name not in planned}:
        link_or_copy(placed.get(file, file), folder / file.name, link=link or file in placed)
        placed.setdefault(file, folder / file.name)
    for name, value in weights.items():
        _point(model, value, here[name], folder)


def converted_bytes(stored: Mapping[str, Stored], wanted: Mapping[str, ir.DataType], changes: Changes) -> int:
    """Bytes of the weights that ``attach`` writes into a new file, for a graph that wants its weights so."""
    return sum(math.prod(stored[name].shape) * int(wanted[name].itemsize) for name in _anew(stored, wanted, changes))


def _anew(stored: Mapping[str, Stored], wanted: Mapping[str, ir.DataType], changes: Changes) -> list[str]:
    """The weights of case 3, and for one of a wider float all of them."""
    cast = any(_is_wider(_DTYPES[stored[name].dtype], dtype) for name, dtype in wanted.items())
    return [name for name in wanted if cast or name in changes]


def _is_wider(held: ir.DataType, wanted: ir.DataType) -> bool:
    """Whether a value of ``held`` may have no exact counterpart in ``wanted``: bfloat16 reaches further than float16, and is coarser."""
    if held == wanted or held not in _FLOATS or wanted not in _FLOATS:
        return False
    return _FLOATS[held] > _FLOATS[wanted] or (held, wanted) == (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)


def _point(model: ir.Model, value: ir.Value, stored: Stored, folder: Path) -> None:
    wanted, held = _dtype(value), _DTYPES[stored.dtype]
    value.const_value = ir.ExternalTensor(
        stored.file.name,
        stored.offset,
        stored.bytes,
        held,
        shape=ir.Shape(stored.shape),
        name=str(value.name),
        base_dir=str(folder),
    )
    if held == wanted:
        return
    users = tuple(value.uses())
    cast = ir.node("Cast", [value], attributes={"to": wanted.value}, name=f"{value.name}.cast")
    cast.outputs[0].name = f"{value.name}.{wanted.name.lower()}"
    cast.outputs[0].shape, cast.outputs[0].dtype = value.shape, wanted
    value.dtype = held
    model.graph.insert_before(users[0].node if len(users) == 1 else model.graph[0], cast)
    for node, index in users:
        node.replace_input_with(index, cast.outputs[0])


def _planned(name: str, source: Stored, dtype: ir.DataType, changes: Sequence[LowRank]) -> Planned:
    return Planned(dtype, source.shape, lambda: _blocks(name, source, dtype, changes))


def _blocks(name: str, source: Stored, dtype: ir.DataType, changes: Sequence[LowRank]) -> Iterator[bytes]:
    """The new values, some rows at a time: a whole tensor, its change and its copy in another dtype may be a gigabyte."""
    added = [change.read() for change in changes]
    held = _DTYPES[source.dtype].numpy()
    rows = source.shape[0] if source.shape else 1
    columns = math.prod(source.shape[1:])
    step = max(1, _BLOCK_BYTES // max(columns * held.itemsize, 1))
    with open(source.file, "rb") as stream:
        stream.seek(source.offset)
        for first in range(0, rows, step):
            values = np.frombuffer(stream.read(min(step, rows - first) * columns * held.itemsize), held)
            if added:
                values = values.astype(np.float32)
                for add in added:
                    add(values.reshape(-1, columns), first)
            yield _converted(name, values, dtype)


def _converted(name: str, values: np.ndarray, dtype: ir.DataType) -> bytes:
    if values.dtype == dtype.numpy():
        return values.tobytes()
    with np.errstate(over="ignore"):
        converted = values.astype(dtype.numpy())
    if dtype in _FLOATS and not np.isfinite(converted).all() and np.isfinite(values).all():
        raise SourceError(
            f"The weight '{name}' does not fit into {dtype.name.lower()}",
            got=f"a magnitude of {np.abs(values.astype(np.float64)).max():g}",
            allowed=f"up to {_largest(dtype):g}",
            do="Export in float32, or keep its module in float32: --keep-fp32 COMPONENT.MODULE.",
        )
    return converted.tobytes()


def _largest(dtype: ir.DataType) -> float:
    return float(ml_dtypes.finfo(dtype.numpy()).max)  # type: ignore[no-untyped-call]


def _dtype(value: ir.Value) -> ir.DataType:
    if value.dtype is None:
        raise SourceError(f"The weight '{value.name}' was traced without a type")
    return value.dtype
