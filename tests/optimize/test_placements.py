"""Every placement, on one small network: where Q/DQ nodes stand, what they compute, and that engines keep the layers in int8."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from edgediffusion.optimize.integers import affine, channel_affine, weight_codes, weight_scale
from edgediffusion.optimize.passes.insert_qdq import insert_qdq
from edgediffusion.optimize.recipe import Placement, Recipe, load_placement
from edgediffusion.optimize.state import LayerState
from edgediffusion.registry import names

# A residual block and a linear layer with a bias, as a denoiser has them: convolutions in a row, one on a concatenation.
MODEL = """
<ir_version: 10, opset_import: ["": 21]>
network (float[2, 8, 6, 6] x) => (float[2, 36, 12] y)
{
  a = Conv <pads = [1, 1, 1, 1]> (x, first_weight, first_bias)
  s = Sigmoid (a)
  b = Mul (a, s)
  c = Conv <pads = [1, 1, 1, 1]> (b, second_weight, second_bias)
  d = Concat <axis = 1> (c, x)
  e = Conv (d, shortcut_weight, shortcut_bias)
  shape = Constant <value_ints = [2, 16, 36]> ()
  f = Reshape (e, shape)
  g = Transpose <perm = [0, 2, 1]> (f)
  turned = Transpose <perm = [1, 0]> (linear_weight)
  h = MatMul (g, turned)
  y = Add (h, linear_bias)
}
"""
SHAPES = {"first": (16, 8, 3, 3), "second": (16, 16, 3, 3), "shortcut": (16, 24, 1, 1), "linear": (12, 16)}
TENSORS = {"first": ("x", "a"), "second": ("b", "c"), "shortcut": ("d", "e"), "linear": ("g", "h")}
RECIPE = Recipe("int8", "int8", "int8")
PLACEMENTS = names("optimize.placements", ".toml")


def _weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found = {f"{n}.weight": (rng.standard_normal(s) / np.sqrt(np.prod(s[1:]))).astype(np.float32) for n, s in SHAPES.items()}
    return found | {f"{n}.bias": rng.standard_normal(s[0]).astype(np.float32) for n, s in SHAPES.items()}


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return _weights()


@pytest.fixture(scope="module")
def proto(weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    model = onnx.parser.parse_model(MODEL)
    for node in model.graph.node:  # the text format has no dots in names, checkpoints have
        node.input[:] = [name.replace("_weight", ".weight").replace("_bias", ".bias") for name in node.input]
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in weights.items())
    return model


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    values = np.random.default_rng(1).standard_normal((2, 8, 6, 6)) * np.array([1, 1, 1, 1, 3, 3, 9, 9]).reshape(1, -1, 1, 1)
    return values.astype(np.float32)


@pytest.fixture(scope="module")
def values(proto: onnx.ModelProto, x: np.ndarray) -> dict[str, np.ndarray]:
    wanted = sorted({tensor for pair in TENSORS.values() for tensor in pair} - {"x"} | {"y"})
    return {"x": x, **dict(zip(wanted, _run(proto, x, wanted), strict=True))}


@pytest.fixture(scope="module")
def states(values: dict[str, np.ndarray], weights: dict[str, np.ndarray]) -> dict[str, LayerState]:
    found = {}
    for name, (source, result) in TENSORS.items():
        rows = [np.moveaxis(values[t], -1 if name == "linear" else 1, 0) for t in (source, result)]
        given, taken = (array.reshape(len(array), -1) for array in rows)
        factors = np.sqrt(np.abs(given).max(1)).astype(np.float32)
        weight = weights[f"{name}.weight"]
        amax = np.abs(weight * factors.reshape(1, -1, *[1] * (weight.ndim - 2))).reshape(len(weight), -1).max(1)
        found[name] = LayerState(factors, given.min(1), given.max(1), taken.min(1), taken.max(1), amax)
    return found


@pytest.fixture(params=PLACEMENTS)
def placement(request: pytest.FixtureRequest) -> Placement:
    return load_placement(request.param)


@pytest.fixture
def quantized(proto: onnx.ModelProto, states: dict[str, LayerState], placement: Placement) -> onnx.ModelProto:
    return _quantize(proto, states, placement)


def _quantize(proto: onnx.ModelProto, states: dict[str, LayerState], placement: Placement) -> onnx.ModelProto:
    model = ir.from_proto(proto)
    report = insert_qdq(model, states, RECIPE, placement)
    assert report.quantized == tuple(SHAPES)
    made = ir.to_proto(model)
    onnx.checker.check_model(made, full_check=True)
    return made


def _options(level: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.log_severity_level = 3
    return options


def _run(model: onnx.ModelProto, x: np.ndarray, wanted: list[str]) -> list[np.ndarray]:
    """Node by node: without optimization, integer kernels are not what is tested."""
    named = onnx.ModelProto.FromString(model.SerializeToString())
    declared = {output.name for output in named.graph.output}
    named.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in wanted if n not in declared)
    session = onnxruntime.InferenceSession(named.SerializeToString(), _options("ORT_DISABLE_ALL"), providers=["CPUExecutionProvider"])
    return [np.asarray(array) for array in session.run(wanted, {"x": x})]


def _layer_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type in ("Conv", "MatMul", "Gemm")]


def test_layers_read_and_give_what_the_placement_says(quantized: onnx.ModelProto, placement: Placement) -> None:
    made_by = {output: node for node in quantized.graph.node for output in node.output}
    for node in _layer_nodes(quantized):
        read, weight = (made_by[name] for name in node.input[:2])
        assert (read.op_type, weight.op_type) == ("DequantizeLinear", "DequantizeLinear")
        assert made_by[read.input[0]].op_type == "QuantizeLinear"
        assert weight.input[0] not in made_by, "weights are stored as integers"
        readers = [other.op_type for other in quantized.graph.node if node.output[0] in other.input]
        assert (readers == ["QuantizeLinear"]) == (node.op_type in placement.outputs)


def test_scales_and_zero_points_are_what_the_engine_takes(quantized: onnx.ModelProto, placement: Placement) -> None:
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in quantized.graph.initializer}
    for node in quantized.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale, zero = constants[node.input[1]], constants[node.input[2]]
        is_weight = node.input[0] in constants
        assert zero.dtype == np.dtype("int8" if is_weight else placement.activations)
        if is_weight or placement.activations == "int8":
            assert not zero.any()
        if not is_weight and (node.op_type == "QuantizeLinear" or not placement.channel_scales):
            assert scale.ndim == 0


def test_numbers_are_those_of_the_state(
    quantized: onnx.ModelProto, placement: Placement, states: dict[str, LayerState], weights: dict[str, np.ndarray], x: np.ndarray
) -> None:
    found = _run(quantized, x, ["y"])[0]
    expected = _simulated(placement, states, weights, x)
    # Both round the same numbers, summed in another order: at most a few codes differ, by one of some 255 steps each.
    assert np.linalg.norm(found - expected) < 0.002 * np.linalg.norm(expected)


def test_every_placement_is_as_exact_as_eight_bits_are(quantized: onnx.ModelProto, values: dict[str, np.ndarray], x: np.ndarray) -> None:
    error = np.linalg.norm(_run(quantized, x, ["y"])[0] - values["y"]) / np.linalg.norm(values["y"])
    # Eight roundings in a row, each of a uniform error of 1/255 of a range that is some six deviations wide: 0.7 % each.
    assert error < np.sqrt(8) * 0.007


def _simulated(placement: Placement, states: dict[str, LayerState], weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The network in float64 with the formulas of integers.py, independent of any graph."""

    def layer(name: str, value: np.ndarray) -> np.ndarray:
        state, weight, bias = states[name], weights[f"{name}.weight"], weights[f"{name}.bias"]
        signed = placement.activations == "int8"
        f = state.factors.astype(np.float64)
        read = affine(*state.input_range(), 8, signed=signed)(value / f.reshape(-1, 1, 1)) if value.ndim == 4 else None
        if read is None:
            read = affine(*state.input_range(), 8, signed=signed)(value / f)
        scale = weight_scale(state.weight_amax, 8)
        balanced = weight * state.factors.reshape(1, -1, *[1] * (weight.ndim - 2))
        stored = weight_codes(balanced, scale, 8) * scale.reshape(-1, *[1] * (weight.ndim - 1)).astype(np.float64)
        if weight.ndim == 2:
            return read @ stored.T + bias
        result = _convolve(read, stored) + bias.reshape(-1, 1, 1)
        return _output(placement, state, result) if "Conv" in placement.outputs else result

    a = layer("first", x.astype(np.float64))
    c = layer("second", a / (1 + np.exp(-a)))
    e = layer("shortcut", np.concatenate([c, x], 1))
    return layer("linear", e.reshape(2, 16, 36).transpose(0, 2, 1))


def _output(placement: Placement, state: LayerState, result: np.ndarray) -> np.ndarray:
    if not placement.channel_scales:
        return affine(*state.output_range(), 8, signed=placement.activations == "int8")(result)
    steps, zeros = (v.reshape(-1, 1, 1) for v in channel_affine(state.output_low, state.output_high, 8))
    return np.asarray((np.clip(np.rint(result / steps + zeros), 0, 255) - zeros) * steps)


def _convolve(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    size = weight.shape[2]
    padded = np.pad(x, ((0, 0), (0, 0), *((size // 2, size // 2),) * 2))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(2, 3))
    return np.einsum("bchwij,ocij->bohw", windows, weight, optimize=True)


def test_onnx_runtime_keeps_every_layer_in_integers(proto: onnx.ModelProto, states: dict[str, LayerState], tmp_path: Path) -> None:
    """Chains stay quantized: no float product is left, and no convolution reads or gives float."""
    model = _quantize(proto, states, load_placement("onnxruntime-cpu"))
    options = _options("ORT_ENABLE_ALL")
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"], disabled_optimizers=["MatMulAddFusion"]
    )
    left = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert left["QLinearConv"] == 3
    assert left["MatMulIntegerToFloat"] == 1
    assert not {"Conv", "FusedConv", "MatMul", "Gemm", "FusedMatMul"} & set(left)


def test_openvino_runs_every_layer_in_integers(
    proto: onnx.ModelProto, states: dict[str, LayerState], x: np.ndarray, tmp_path: Path
) -> None:
    openvino = pytest.importorskip("openvino")
    model = _quantize(proto, states, load_placement("openvino"))
    onnx.save(model, tmp_path / "model.onnx")
    compiled = openvino.Core().compile_model(tmp_path / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    run_in = [
        op.get_rt_info()["runtimePrecision"].astype(str)
        for op in compiled.get_runtime_model().get_ordered_ops()
        if op.get_rt_info()["layerType"].astype(str) in ("Convolution", "FullyConnected", "MatMul")
    ]
    assert len(run_in) == len(SHAPES)
    assert set(run_in) <= {"u8", "i8"}
    found, expected = next(iter(compiled({"x": x}).values())), _run(model, x, ["y"])[0]
    # OpenVINO folds scales into the operators before Q: codes that lie between two steps may fall the other way.
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


def test_tensorrt_runs_every_layer_in_integers(proto: onnx.ModelProto, states: dict[str, LayerState]) -> None:
    """TensorRT-RTX builds without a GPU. Its engine cannot be read there, but the builder's log lists the layers."""
    library = pytest.importorskip("tensorrt_rtx")
    model = _quantize(proto, states, load_placement("tensorrt"))
    lines: list[str] = []

    class Log(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            library.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            lines.extend(message.splitlines())

    log = Log()
    builder = library.Builder(log)
    network = builder.create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert library.OnnxParser(network, log).parse(model.SerializeToString())
    config = builder.create_builder_config()
    config.profiling_verbosity = library.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(library.ComputeCapability.SM89, 0)
    assert builder.build_serialized_network(network, config) is not None
    layers = [line for line in lines if re.search(r"LayerType: (correlation|gemm)", line)]
    assert len(layers) == len(SHAPES)
    for line in layers:
        read, constants = (re.search(rf"{part}: \[.*?Datatype: (\w+)", line) for part in ("Inputs", "Constants"))
        assert (read and read[1], constants and constants[1]) == ("Int8", "Int8")


def test_tensorrt_refuses_zero_points(proto: onnx.ModelProto, states: dict[str, LayerState]) -> None:
    """Why its placement is symmetric."""
    library = pytest.importorskip("tensorrt_rtx")
    model = _quantize(proto, states, load_placement("openvino"))
    log = library.Logger(library.Logger.INTERNAL_ERROR)
    network = library.Builder(log).create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = library.OnnxParser(network, log)
    assert not parser.parse(model.SerializeToString())
    assert any("zero point" in parser.get_error(i).desc() for i in range(parser.num_errors))
