"""The weights of a graph: in the source's own file where they can be, in a new file where they must change.

For each tensor one of three cases:

1. it is stored in the dtype of the graph: the initializer points to it in the linked or copied file;
2. it is stored in a narrower float: the same, with a Cast node behind, which an engine folds when it loads;
3. it is stored in a wider float: it is converted into a new file of the bundle, which holds the graph's tensors only.

One file serves a graph: if any tensor needs case 3, all go to the new file, so that no file is linked for a rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgediffusion.errors import SourceError
from edgediffusion.export.checkpoint import Stored
from edgediffusion.export.store import CODES, Planned, write_tensors
from edgediffusion.files import link_or_copy

CONVERTED = "weights.safetensors"
_DTYPES = {code: dtype for dtype, code in CODES.items()}
_FLOATS = {ir.DataType.BFLOAT16: 0, ir.DataType.FLOAT16: 1, ir.DataType.FLOAT: 2, ir.DataType.DOUBLE: 3}


def attach(model: ir.Model, stored: Mapping[str, Stored], folder: Path, *, link: bool, placed: dict[Path, Path]) -> None:
    """Give the initializers named in ``stored`` their values, in files that lie in ``folder``, the graph's own.

    ``placed`` remembers where in the bundle a source file already is: a second graph with the same weights links to it.

    Raises:
        SourceError: a weight has no place in the dtype of the graph.
    """
    weights = {name: model.graph.initializers[name] for name in sorted(stored)}
    if any(_is_wider(_DTYPES[stored[name].dtype], _dtype(value)) for name, value in weights.items()):
        here = write_tensors(folder / CONVERTED, {name: _converted(name, stored[name], _dtype(v)) for name, v in weights.items()})
    else:
        here = dict(stored)
        for file in {stored[name].file for name in weights}:
            link_or_copy(placed.get(file, file), folder / file.name, link=link or file in placed)
            placed.setdefault(file, folder / file.name)
    for name, value in weights.items():
        _point(model, value, here[name], folder)


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


def _converted(name: str, source: Stored, dtype: ir.DataType) -> Planned:
    return Planned(dtype, source.shape, lambda: _values(name, source, dtype))


def _values(name: str, source: Stored, dtype: ir.DataType) -> bytes:
    with open(source.file, "rb") as stream:
        stream.seek(source.offset)
        values = np.frombuffer(stream.read(source.bytes), _DTYPES[source.dtype].numpy())
    with np.errstate(over="ignore"):
        converted = values.astype(dtype.numpy())
    if dtype in _FLOATS and not np.isfinite(converted).all() and np.isfinite(values).all():
        raise SourceError(
            f"The weight '{name}' does not fit into {dtype.name.lower()}",
            got=f"a magnitude of {np.abs(values.astype(np.float64)).max():g}",
            allowed=f"up to {np.finfo(dtype.numpy()).max}",
            do="Export in float32.",
        )
    return converted.tobytes()


def _is_wider(held: ir.DataType, wanted: ir.DataType) -> bool:
    """Whether a value of ``held`` may have no exact counterpart in ``wanted``: bfloat16 reaches further than float16."""
    if held == wanted or held not in _FLOATS or wanted not in _FLOATS:
        return False
    return _FLOATS[held] > _FLOATS[wanted] or (held, wanted) == (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)


def _dtype(value: ir.Value) -> ir.DataType:
    if value.dtype is None:
        raise SourceError(f"The weight '{value.name}' was traced without a type")
    return value.dtype
