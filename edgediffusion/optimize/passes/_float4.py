"""Four-bit floating point in a graph: NVFP4 as TensorRT reads it, and all formats as operators on float numbers.

TensorRT (``TRT_FP4DynamicQuantize`` is its own operator; s and b as in ``optimize/float4.py``):

    x ─ TRT_FP4DynamicQuantize(s) ─┬──────────── q ─ DQ(blocks of 16) ─ MatMul
                                   └ b ─ DQ(s) ──────┘                  │
                              w's q ─ DQ(blocks of 16) ─────────────────┘
                        w's b ─ DQ(s) ──┘

Q and DQ of ONNX alone, with FLOAT4E2M1 and constant scales, are read too, but the engine then multiplies in float (docs/placements.md).

Simulated: inputs go through ``edgediffusion.ReadE2M1`` or another function of the model itself, which rounds float numbers to those of
the format; weights are the numbers that would be read.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from edgediffusion.optimize.float4 import (
    BLOCK,
    float4_scale,
    nvfp4_block_scales,
    nvfp4_tensor_scale,
    nvfp4_values,
    read_float4,
    read_nvfp4,
)
from edgediffusion.optimize.graph_layers import Layer
from edgediffusion.optimize.integers import e4m3_scale
from edgediffusion.optimize.passes._additions import Additions
from edgediffusion.optimize.passes._simulation import DOMAIN, function_name
from edgediffusion.optimize.passes._weights import as_read, balanced, output_axis, shape_as_read
from edgediffusion.optimize.state import LayerState

TENSORRT = "trt"
_F4, _F8 = ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E4M3FN
_RANKS = (2, 3)  # of what TRT_FP4DynamicQuantize takes
OPSET = 23  # the first with FLOAT4E2M1


def nvfp4_declines(layer: Layer, *, simulated: bool) -> str | None:
    """Why NVFP4 cannot have the layer."""
    source = layer.node.inputs[0]
    if layer.node.op_type == "Conv":
        return "NVFP4 is for matrix products: no engine has convolutions of it"
    if layer.channels[0] % BLOCK:
        return f"its {layer.channels[0]} input channels are no whole blocks of {BLOCK}"
    if not simulated and (source is None or source.shape is None or source.shape.rank() not in _RANKS):
        return "TensorRT quantizes tensors of two or three axes to NVFP4"
    return None


def nvfp4_input(add: Additions, value: ir.Value, layer: Layer, amax: float) -> ir.Value:
    """``value`` quantized by TensorRT at run time, and read back."""
    scale = _tensor_scale(amax, layer)
    name, node = value.name, layer.node
    attributes = {"axis": -1, "block_size": BLOCK, "scale_type": int(_F8)}
    q = ir.node("TRT_FP4DynamicQuantize", [value, add.constant(f"{name}.fp4.scale", scale)], attributes, domain=TENSORRT, num_outputs=2)
    codes = add.made(q, f"{name}.fp4", value, _F4, before=node)
    q.outputs[1].name, q.outputs[1].dtype = add.unused(f"{name}.fp4.blocks"), _F8
    assert value.shape is not None
    q.outputs[1].shape = ir.Shape([*value.shape[:-1], layer.channels[0] // BLOCK])
    steps = _dequantize(add, q.outputs[1], add.constant(f"{name}.fp4.dq.scale", scale), f"{name}.fp4.steps", layer)
    return _dequantize(add, codes, steps, f"{name}.dequantized", layer, axis=-1)


def nvfp4_weight(add: Additions, layer: Layer, state: LayerState) -> ir.Value:
    """Codes, scales of blocks and the scale of the tensor, and the two nodes that read them."""
    name, scale = f"{layer.name}.weight", _tensor_scale(float(state.weight_amax.max()), layer)
    shape, axis = shape_as_read(layer), 1 - output_axis(layer)
    blocks = tuple(size // BLOCK if at == axis else size for at, size in enumerate(shape))

    def scales() -> np.ndarray:
        return nvfp4_block_scales(balanced(layer, state), np.float32(scale))

    def values() -> np.ndarray:
        return as_read(nvfp4_values(balanced(layer, state), scales(), np.float32(scale)), layer).astype(_F4.numpy())

    codes = add.later(f"{name}.codes", values, _F4, shape)
    stored = add.later(f"{name}.blocks", lambda: as_read(scales(), layer), _F8, blocks)
    steps = _dequantize(add, stored, add.constant(f"{name}.scale", scale), f"{name}.steps", layer)
    return _dequantize(add, codes, steps, f"{name}.dequantized", layer, axis=axis)


def simulated_input(add: Additions, value: ir.Value, layer: Layer, kind: str, amax: float) -> ir.Value:
    """``value`` as it is read back from a format, by a function of the model: see ``simulation``."""
    scale = nvfp4_tensor_scale(amax) if kind == "nvfp4" else e4m3_scale(amax) if kind == "fp8" else float4_scale(amax, kind)
    given = add.constant(f"{value.name}.{kind}.scale", np.asarray(scale, np.float32))
    read = ir.node(function_name(kind), [value, given], domain=DOMAIN)
    return add.made(read, f"{value.name}.{kind}", value, layer.dtype, before=layer.node)


def simulated_weight(add: Additions, layer: Layer, state: LayerState, kind: str) -> ir.Value:
    """A weight as it is read back from a format: float numbers, since ONNX Runtime fuses a DQ of blocks with kernels that round inputs."""

    def values() -> np.ndarray:
        weight = balanced(layer, state)
        if kind != "nvfp4":
            amax = state.weight_amax.reshape(-1, *[1] * (weight.ndim - 1))
            return as_read(read_float4(weight.astype(np.float32), amax, kind), layer).astype(layer.dtype.numpy())
        return as_read(read_nvfp4(weight), layer).astype(layer.dtype.numpy())

    return add.later(f"{layer.name}.weight.read", values, layer.dtype, shape_as_read(layer))


def _tensor_scale(amax: float, layer: Layer) -> np.ndarray:
    """s in the number format that the layer computes in, as the engine wants it, and never 0 there."""
    dtype = layer.dtype.numpy()
    return np.asarray(max(np.float32(ml_dtypes.finfo(dtype).tiny), nvfp4_tensor_scale(amax)), dtype)  # type: ignore[no-untyped-call]


def _dequantize(add: Additions, value: ir.Value, scale: ir.Value, name: str, layer: Layer, *, axis: int | None = None) -> ir.Value:
    attributes = {} if axis is None else {"axis": axis, "block_size": BLOCK}
    node = ir.node("DequantizeLinear", [value, scale], attributes)
    return add.made(node, name, value, layer.dtype, before=layer.node)
