"""The Q/DQ pass on tiny graphs: which nodes it writes, what it declines, and that numbers follow the formulas."""

from dataclasses import replace

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime
import pytest

from edgediffusion.optimize.passes.insert_qdq import insert_qdq
from edgediffusion.optimize.recipe import Placement, Recipe
from edgediffusion.optimize.state import LayerState

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
LAYERS = ("Conv", "MatMul", "Gemm")
CPU = Placement("cpu", "uint8", LAYERS, ("Conv",))
CHANNELS = Placement("channels", "uint8", LAYERS, ("Conv",), channel_scales=True)
SYMMETRIC = Placement("symmetric", "int8", LAYERS)


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


def _layer(weight, source, result, *, factors=None, channel=1, **more):
    """The state of a layer whose input and output have their channels on the given axis."""
    factors = np.ones(weight.shape[1], np.float32) if factors is None else factors.astype(np.float32)
    x, y = (np.moveaxis(array, channel, 0).reshape(array.shape[channel], -1).astype(np.float32) for array in (source, result))
    balanced = weight.astype(np.float32) * factors.reshape(1, -1, *[1] * (weight.ndim - 2))
    amax = np.abs(balanced).reshape(len(weight), -1).max(1)
    return LayerState(factors, x.min(1), x.max(1), y.min(1), y.max(1), amax, **more)


@pytest.fixture
def values(proto, x):
    return onnx.reference.ReferenceEvaluator(proto).run(None, {"x": x}, intermediate=True)


@pytest.fixture
def states(values, weights, x):
    return {
        "conv": _layer(weights["conv.weight"], x, values["a"]),
        "linear": _layer(weights["linear.weight"], values["d"], values["e"], channel=2),
        "other": _layer(weights["other.weight"], values["d"], values["f"], channel=2),
    }


@pytest.fixture
def balanced(values, weights, x):
    """As ``states``, with factors by channel; both products read the same tensor and share theirs."""
    factors, shared = np.array([0.5, 1, 2, 2]), np.array([1.5, 1, 0.5, 2, 0.5])
    return {
        "conv": _layer(weights["conv.weight"], x, values["a"], factors=factors),
        "linear": _layer(weights["linear.weight"], values["d"], values["e"], factors=shared, channel=2),
        "other": _layer(weights["other.weight"], values["d"], values["f"], factors=shared, channel=2),
    }


def _run(model, x):
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


@pytest.mark.parametrize("placement", [CPU, CHANNELS, SYMMETRIC], ids=lambda p: p.name)
def test_the_quantized_graph_is_close_and_every_layer_is_quantized(proto, states, x, placement):
    model = ir.from_proto(proto)
    report = insert_qdq(model, states, RECIPE, placement)
    assert report.quantized == ("conv", "linear", "other")
    assert report.declined == {}
    quantized = ir.to_proto(model)
    onnx.checker.check_model(quantized, full_check=True)
    expected = _run(proto, x)
    # Three int8 tensors in a row, each wrong by at most half of 1/127 of its range: 2 % of the result's norm is ample.
    assert np.linalg.norm(_run(quantized, x) - expected) < 0.02 * np.linalg.norm(expected)


def test_nodes_follow_the_placement(proto, states):
    model = ir.from_proto(proto)
    insert_qdq(model, states, RECIPE, CPU)
    ops = [node.op_type for node in model.graph]
    # Inputs of conv and of both products (one tensor), the output of conv; three weights have a DQ alone.
    assert ops.count("QuantizeLinear") == 3
    assert ops.count("DequantizeLinear") == 6
    assert ops.count("Cast") == 0, "the cast that served the float weight is gone"
    assert ops.count("Transpose") == 1, "weights are turned when they are written, not when they are read"
    assert not {"conv.weight", "linear.weight", "other.weight"} & set(model.graph.initializers)


def test_no_scale_is_shared(proto, states):
    model = ir.from_proto(proto)
    insert_qdq(model, states, RECIPE, CPU)
    scales = [node.inputs[1].name for node in model.graph if "quantize" in node.op_type.lower()]
    assert len(scales) == len(set(scales))


def test_what_is_declined_says_why(proto, states):
    model = ir.from_proto(proto)
    del states["other"]
    report = insert_qdq(model, states, Recipe("r", "int8", "int8", exclude=("^conv$",)), CPU)
    assert report.quantized == ("linear",)
    assert "'^conv$'" in report.declined["conv"]
    assert "did not reach" in report.declined["other"]


@pytest.mark.parametrize("placement", [CPU, CHANNELS, SYMMETRIC], ids=lambda p: p.name)
@pytest.mark.parametrize("weights_as", ["int8", "int4"])
def test_factors_change_the_rounding_and_nothing_else(proto, balanced, x, placement, weights_as):
    """With factors of 1/2 to 2 the graph is still that of the network, to what rounding does to it."""
    model = ir.from_proto(proto)
    insert_qdq(model, balanced, Recipe("r", weights_as, "int8"), placement)
    quantized = ir.to_proto(model)
    onnx.checker.check_model(quantized, full_check=True)
    expected = _run(proto, x)
    allowed = 0.06 if weights_as == "int8" else 0.5
    assert np.linalg.norm(_run(quantized, x) - expected) < allowed * np.linalg.norm(expected)


@pytest.mark.parametrize("placement", [CPU, CHANNELS, SYMMETRIC], ids=lambda p: p.name)
def test_factors_cost_one_product_for_each_tensor_and_no_vector_of_scales(proto, balanced, placement):
    """A vector in front of an integer kernel is what ONNX Runtime quantizes value by value."""
    model = ir.from_proto(proto)
    insert_qdq(model, balanced, RECIPE, placement)
    assert [node.op_type for node in model.graph].count("Mul") == 2
    for node in model.graph:
        assert node.op_type != "QuantizeLinear" or node.inputs[1].const_value.size == 1


def test_outputs_have_scales_by_channel_behind_the_kernel(proto, balanced):
    model = ir.from_proto(proto)
    insert_qdq(model, balanced, RECIPE, CHANNELS)
    nodes = {node.outputs[0].name: node for node in model.graph}

    def scale(name):
        return nodes[name].inputs[1].const_value.numpy()

    assert scale("a.quantized") == 1
    spans = balanced["conv"].output_high.clip(min=0) - balanced["conv"].output_low.clip(max=0)
    np.testing.assert_allclose(scale("a.dequantized"), spans / 255, rtol=1e-6)


def test_an_output_by_channel_is_finer_than_one_for_all(proto, states, weights, x):
    """One channel a hundred times as wide as the others takes their codes from them, unless each has its own scale."""
    weights["conv.weight"][0] *= 100
    for tensor in proto.graph.initializer:
        if tensor.name == "conv.weight":
            tensor.CopyFrom(onnx.numpy_helper.from_array(weights["conv.weight"], "conv.weight"))
    values = onnx.reference.ReferenceEvaluator(proto).run(None, {"x": x}, intermediate=True)
    states = {"conv": _layer(weights["conv.weight"], x, values["a"])}
    errors = {}
    for placement in (CPU, CHANNELS):
        model = ir.from_proto(proto)
        insert_qdq(model, states, RECIPE, placement)
        named = ir.to_proto(model)
        named.graph.output.append(onnx.helper.make_tensor_value_info("a.dequantized", onnx.TensorProto.FLOAT, None))
        session = onnxruntime.InferenceSession(named.SerializeToString(), providers=["CPUExecutionProvider"])
        errors[placement.name] = np.abs(session.run(["a.dequantized"], {"x": x})[0] - values["a"])[:, 1:].mean()
    assert errors["channels"] < 0.1 * errors["cpu"]


def test_stored_codes_and_biases_are_written_as_they_are(proto, values, weights, x):
    codes = np.random.default_rng(5).integers(-7, 8, (3, 5)).astype(np.int8)
    bias = np.array([1.0, -2.0, 3.0], np.float32)
    layer = _layer(weights["other.weight"], values["d"], values["f"], channel=2, codes=codes, bias=bias)
    model = ir.from_proto(proto)
    insert_qdq(model, {"other": layer}, Recipe("r", "int4", "int8"), SYMMETRIC)
    stored = model.graph.initializers["other.weight.codes.transposed"].const_value
    assert stored.dtype == ir.DataType.INT4
    np.testing.assert_array_equal(stored.numpy().astype(np.int8), codes.T)
    np.testing.assert_array_equal(model.graph.initializers["other.bias.learned"].const_value.numpy(), bias)


def test_weights_alone(proto, states, x):
    model = ir.from_proto(proto)
    insert_qdq(model, states, Recipe("r", "int4", "float"), SYMMETRIC)
    assert "QuantizeLinear" not in [node.op_type for node in model.graph]
    assert [node.op_type for node in model.graph].count("DequantizeLinear") == 3


def test_a_layer_whose_input_never_changed_stays_float(proto, states):
    states["conv"].input_low[:] = states["conv"].input_high[:] = 0.0
    report = insert_qdq(ir.from_proto(proto), states, RECIPE, CPU)
    assert "never changed" in report.declined["conv"]


def test_a_scale_for_each_group_of_inputs(weights):
    """A matrix product with 4-bit weights in groups of 16 is one kernel of ONNX Runtime; convolutions keep one scale a channel."""
    rng = np.random.default_rng(3)
    weight = (rng.standard_normal((8, 32)) * np.repeat([1, 0.01], 16)).astype(np.float32)
    x = rng.standard_normal((2, 5, 32)).astype(np.float32)
    proto = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 21]>
        network (float[n, 5, 32] x) => (float[n, 5, 8] y) { turned = Transpose <perm = [1, 0]> (w) y = MatMul (x, turned) }
        """)
    proto.graph.node[0].input[0] = "linear.weight"
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "linear.weight"))
    state = _layer(weight, x, x @ weight.T, channel=2)
    state = replace(state, weight_amax=np.abs(weight).reshape(8, 2, 16).max(2))
    model = ir.from_proto(proto)
    assert insert_qdq(model, {"linear": state}, Recipe("r", "int4", "float", group=16), CPU).quantized == ("linear",)
    quantized = ir.to_proto(model)
    onnx.checker.check_model(quantized, full_check=True)
    codes = model.graph.initializers["linear.weight.codes.transposed"].const_value
    assert codes.dtype == ir.DataType.INT4, "4 bits in the file, whatever 8-bit kernels want"
    step = np.repeat(np.abs(weight).reshape(8, 2, 16).max(2) / 7, 16, 1)
    expected = x @ (np.rint(weight / step) * step).T
    np.testing.assert_allclose(onnx.reference.ReferenceEvaluator(quantized).run(None, {"x": x})[0], expected, rtol=1e-4, atol=1e-4)
    # ONNX Runtime's one kernel for it (MatMulNBits) rounds activations to 8 bits by itself.
    assert np.linalg.norm(_run(quantized, x) - expected) < 0.02 * np.linalg.norm(expected)


def test_fp8(proto, states, x):
    """E4M3 has 3 bits of mantissa: each of the tensors is wrong by at most 1/16 of a value, a good 2 % of its norm."""
    model = ir.from_proto(proto)
    insert_qdq(model, states, Recipe("fp8", "fp8", "fp8"), SYMMETRIC)
    quantized = ir.to_proto(model)
    onnx.checker.check_model(quantized, full_check=True)
    assert {init.data_type for init in quantized.graph.initializer if ".codes" in init.name} == {onnx.TensorProto.FLOAT8E4M3FN}
    expected = _run(proto, x)
    found = onnx.reference.ReferenceEvaluator(quantized).run(None, {"x": x})[0]  # ONNX Runtime's CPU engine has no fp8 products
    assert 0.001 < np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.06
