"""The file of a graph: read although its weights are linked, and written with its weights in one new file beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WEIGHTS = "quantized.safetensors"
_SMALL_BYTES = 256  # of weights' codes that stay in the graph
_LARGE_BYTES = 1 << 16  # of anything else that leaves it


def load_graph(file: Path) -> Any:
    """A graph whose weights may be files with several links: onnx-ir takes those for an attack and refuses to read them.

    Opening the bundle has checked their hashes. A tensor with an absolute location and no base folder is read as it is.
    """
    import onnx_ir as ir

    model = ir.load(file)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            place = file.parent / tensor.location
            value.const_value = ir.ExternalTensor(
                place, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=str(tensor.name), base_dir=""
            )
    return model


def store_weights(model: Any, folder: Path, name: str = WEIGHTS) -> None:
    """Put the weights, quantized or not, into the new file ``name`` of ``folder``; small constants stay in the graph."""
    import onnx_ir as ir

    from edgediffusion.export.store import write_tensors

    chosen = {n: v.const_value for n, v in model.graph.initializers.items() if _goes_out(v.const_value)}
    stored = write_tensors(folder / name, {n: _planned(t) for n, t in chosen.items()})
    for n, tensor in chosen.items():
        at = stored[n]
        model.graph.initializers[n].const_value = ir.ExternalTensor(
            name, at.offset, at.bytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=n, base_dir=str(folder)
        )


def _goes_out(tensor: Any) -> bool:
    import onnx_ir as ir

    if tensor is None or isinstance(tensor, ir.ExternalTensor):
        return tensor is not None
    codes = tensor.dtype in (ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT4E2M1)
    return bool(tensor.nbytes > (_SMALL_BYTES if codes else _LARGE_BYTES))


def _planned(tensor: Any) -> Any:
    import onnx_ir as ir

    from edgediffusion.export.store import Planned

    if tensor.dtype in (ir.DataType.INT4, ir.DataType.FLOAT4E2M1):  # two to a byte; the file's format has no such type
        return Planned(ir.DataType.UINT8, (tensor.nbytes,), tensor.tobytes)
    return Planned(tensor.dtype, tuple(tensor.shape.numpy()), lambda: _read(tensor))


def _read(tensor: Any) -> bytes:
    """A tensor's bytes. One of a file is let go again: its pages would stay in memory until the last one is written."""
    import onnx_ir as ir

    values: bytes = tensor.tobytes()
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return values
