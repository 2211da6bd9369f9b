"""The Q/DQ pass on tiny graphs: which nodes it writes, what it declines, and that numbers follow the formulas."""

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime
import pytest

from edgediffusion.optimize.passes.insert_qdq import activation_scale, insert_qdq, quantize_weight
from edgediffusion.optimize.recipe import Placement, Recipe
from edgediffusion.optimize.state import LayerRanges, TensorRange

MODEL = """
<ir_version: 10, opset_import: ["": 21]>
network (float[n, 4, 6, 6] x) => (float[n, 36, 3] y)
{
  a = Conv <pads = [1, 1, 1, 1]> (x, conv_weight)
  b = Relu (a)
  shape = Constant <value_ints = [0, 5, 36]> ()
  c = Reshape (b, shape)
  d = Transpose <perm = [0, 2, 1]> (c)
  wide = Cast <to = 1> (linear_weight)
  turned = Transpose <perm = [1, 0]> (wide)
  e = MatMul (d, turned)
  turned2 = Transpose <perm = [1, 0]> (other_weight)
  f = MatMul (d, turned2)
  g = Add (e, f)
  y = Add (g, linear_bias)
}
"""
RECIPE = Recipe("int8", "int8", "int8")
CPU = Placement("cpu", "uint8", ("Conv", "MatMul", "Gemm"), ("Conv",))
SYMMETRIC = Placement("symmetric", "int8", ("Conv", "MatMul", "Gemm"))


@pytest.fixture
def weights():
    rng = np.random.default_rng(0)
    return {
        "conv.weight": rng.standard_normal((5, 4, 3, 3)).astype(np.float32),
        "linear.weight": rng.standard_normal((3, 5)).astype(np.float16),
        "other.weight": rng.standard_normal((3, 5)).astype(np.float32),
        "linear.bias": rng.standard_normal(3).astype(np.float32),
    }


@pytest.fixture
def proto(weights):
    model = onnx.parser.parse_model(MODEL)
    for node in model.graph.node:  # the text format has no dots in names, checkpoints have
        node.input[:] = [name.replace("_weight", ".weight").replace("_bias", ".bias") for name in node.input]
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in weights.items())
    return model


@pytest.fixture
def x():
    return np.random.default_rng(1).standard_normal((2, 4, 6, 6)).astype(np.float32)


@pytest.fixture
def ranges(proto, weights, x):
    values = onnx.reference.ReferenceEvaluator(proto).run(None, {"x": x}, intermediate=True)

    def bounds(array):
        return TensorRange(float(array.min()), float(array.max()), float(np.abs(array).max()))

    def layer(weight, source, result):
        return LayerRanges(bounds(source), bounds(result), tuple(np.abs(weight).reshape(len(weight), -1).max(1).astype(float)))

    return {
        "conv": layer(weights["conv.weight"], x, values["a"]),
        "linear": layer(weights["linear.weight"], values["d"], values["e"]),
        "other": layer(weights["other.weight"], values["d"], values["f"]),
    }


def _run(model, x):
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


@pytest.mark.parametrize("placement", [CPU, SYMMETRIC], ids=lambda p: p.name)
def test_the_quantized_graph_is_close_and_every_layer_is_quantized(proto, ranges, x, placement):
    model = ir.from_proto(proto)
    report = insert_qdq(model, ranges, RECIPE, placement)
    assert report.quantized == ("conv", "linear", "other")
    assert report.declined == {}
    quantized = ir.to_proto(model)
    onnx.checker.check_model(quantized, full_check=True)
    expected = _run(proto, x)
    # Three int8 tensors in a row, each wrong by at most half of 1/127 of its range: 2 % of the result's norm is ample.
    assert np.linalg.norm(_run(quantized, x) - expected) < 0.02 * np.linalg.norm(expected)


def test_nodes_follow_the_placement(proto, ranges):
    model = ir.from_proto(proto)
    insert_qdq(model, ranges, RECIPE, CPU)
    ops = [node.op_type for node in model.graph]
    # Inputs of conv and of both products (one tensor), the output of conv; three weights have a DQ alone.
    assert ops.count("QuantizeLinear") == 3
    assert ops.count("DequantizeLinear") == 6
    assert ops.count("Cast") == 0, "the cast that served the float weight is gone"
    assert ops.count("Transpose") == 1, "weights are turned when they are written, not when they are read"
    assert not {"conv.weight", "linear.weight", "other.weight"} & set(model.graph.initializers)


def test_no_scale_is_shared(proto, ranges):
    model = ir.from_proto(proto)
    insert_qdq(model, ranges, RECIPE, CPU)
    scales = [node.inputs[1].name for node in model.graph if "quantize" in node.op_type.lower()]
    assert len(scales) == len(set(scales))


def test_what_is_declined_says_why(proto, ranges):
    model = ir.from_proto(proto)
    del ranges["other"]
    report = insert_qdq(model, ranges, Recipe("r", "int8", "int8", ("^conv$",)), CPU)
    assert report.quantized == ("linear",)
    assert "'^conv$'" in report.declined["conv"]
    assert "no ranges" in report.declined["other"]


def test_weight_formula():
    # w = 0.5 of amax 1 is 63.5 steps: half to even gives 64 (METHODS 2.1).
    q, scale = quantize_weight(np.array([[-1.0, 0.5, 1.0]]), np.array([1.0]))
    assert scale[0] == np.float32(1 / 127)
    assert q.tolist() == [[-127, 64, 127]]


def test_activation_ranges_contain_zero():
    scale, zero = activation_scale(TensorRange(1.0, 2.0, 2.0), "uint8")
    assert (scale, zero) == (np.float32(2 / 255), 0)
    scale, zero = activation_scale(TensorRange(-1.0, 2.0, 2.0), "uint8")
    assert (scale, zero) == (np.float32(3 / 255), 85)  # METHODS 2.1: delta 0.01176471, z = 85
    scale, zero = activation_scale(TensorRange(0.0, 0.0, 0.0), "uint8")
    assert np.isfinite(scale)
    assert scale > 0


def test_a_calibrator_that_clips_narrows_the_range():
    scale, zero = activation_scale(TensorRange(-0.25, 100.0, 2.0), "uint8")
    assert scale == np.float32(2.25 / 255)
    assert zero == 28
