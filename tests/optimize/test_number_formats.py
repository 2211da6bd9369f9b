"""Graphs of four-bit floating point and of ranges found at run time: the nodes, and that numbers follow the formulas."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from edgediffusion import targets
from edgediffusion.errors import ArgumentError
from edgediffusion.optimize.float4 import (
    MAGNITUDES,
    choose_weight_format,
    nvfp4_block_scales,
    nvfp4_tensor_scale,
    nvfp4_values,
    read_float4,
    read_nvfp4,
    round_to,
)
from edgediffusion.optimize.integers import weight_codes, weight_scale
from edgediffusion.optimize.passes.insert_qdq import insert_qdq
from edgediffusion.optimize.quantize import check_device, check_formats
from edgediffusion.optimize.recipe import Recipe, load_placement, load_recipe
from edgediffusion.optimize.state import LayerState

# Two products of one tensor, one with a bias, and a third behind them: what attention's projections look like.
MODEL = """
<ir_version: 10, opset_import: ["": 23]>
network (float[n, 5, 64] x) => (float[n, 5, 32] y, float[n, 5, 48] e)
{
  first_turned = Transpose <perm = [1, 0]> (first_weight)
  a = MatMul (x, first_turned)
  b = Add (a, first_bias)
  other_turned = Transpose <perm = [1, 0]> (other_weight)
  e = MatMul (x, other_turned)
  g = Tanh (b)
  last_turned = Transpose <perm = [1, 0]> (last_weight)
  y = MatMul (g, last_turned)
}
"""
SHAPES = {"first": (96, 64), "other": (48, 64), "last": (32, 96)}
CPU, SIMULATED, TENSORRT = (load_placement(name) for name in ("onnxruntime-cpu", "simulated", "tensorrt"))


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)
    found = {name: (rng.standard_normal(shape) / 8).astype(np.float32) for name, shape in SHAPES.items()}
    found["first"][:, :16] *= 4  # one group of inputs has large weights
    return found | {"bias": rng.standard_normal(96).astype(np.float32)}


@pytest.fixture(scope="module")
def x():
    values = np.random.default_rng(1).standard_normal((2, 5, 64)).astype(np.float32)
    return values * np.array([1, 3, 1, 1, 0.1], np.float32)[:, None]  # tokens of unequal size


def _proto(weights, dtype=np.float32):
    text = MODEL.replace("float[", {"float32": "float[", "float16": "float16[", "bfloat16": "bfloat16["}[np.dtype(dtype).name])
    model = onnx.parser.parse_model(text)
    for node in model.graph.node:  # the text format has no dots in names, checkpoints have
        node.input[:] = [name.replace("_weight", ".weight").replace("_bias", ".bias") for name in node.input]
    tensors = {f"{name}.weight": weights[name] for name in SHAPES} | {"first.bias": weights["bias"]}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array.astype(dtype), name) for name, array in tensors.items())
    return onnx.shape_inference.infer_shapes(model)


def _states(weights, x, **more):
    g = np.tanh(x @ weights["first"].T + weights["bias"])
    found = {}
    for name, source in (("first", x), ("other", x), ("last", g)):
        columns, weight = source.reshape(-1, source.shape[-1]), weights[name]
        result = columns @ weight.T
        bounds = (columns.min(0), columns.max(0), result.min(0), result.max(0))
        found[name] = LayerState(np.ones(weight.shape[1], np.float32), *bounds, np.abs(weight).max(1), **more)
    return found


def _made(weights, states, recipe, placement, dtype=np.float32):
    model = ir.from_proto(_proto(weights, dtype))
    report = insert_qdq(model, states, recipe, placement)
    assert report.quantized == tuple(SHAPES), report.declined
    return ir.to_proto(model)


def _run(model, x, *, optimize=True):
    options = onnxruntime.SessionOptions()
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"], disabled_optimizers=["MatMulAddFusion"]
    )
    return session.run(["y", "e"], {"x": x})


def _expected(weights, x, read_input, read_weight):
    """The network by NumPy: ``read_input(name, x)`` and ``read_weight(name, w)`` are what is read back."""
    shared = read_input("first", x)
    g = np.tanh(shared @ read_weight("first", weights["first"]).T + weights["bias"])
    return read_input("last", g) @ read_weight("last", weights["last"]).T, shared @ read_weight("other", weights["other"]).T


def _close(found, expected, tolerance=1e-5, *, behind=0.02):
    """What the first layers give is ``expected`` within ``tolerance``. The last one's input is not to the bit, as sums have another order:
    a few of its values, near a tie, fall to the other side."""
    (y, e), (wanted_y, wanted_e) = found, expected
    assert np.linalg.norm(e - wanted_e) <= tolerance * np.linalg.norm(wanted_e)
    assert np.linalg.norm(y - wanted_y) <= behind * np.linalg.norm(wanted_y)


def _nvfp4(values, scale):
    rows = values.reshape(-1, values.shape[-1])
    blocks = nvfp4_block_scales(rows, scale)
    steps = np.repeat(blocks.astype(np.float32) * scale, 16, 1)
    return (nvfp4_values(rows, blocks, scale) * steps).reshape(values.shape)


def _amax(state):
    return max(abs(bound) for bound in state.input_range())


@pytest.mark.parametrize("form", MAGNITUDES)
def test_a_simulated_function_is_numpys_rounding_to_the_bit(form):
    """Also at every tie, and beyond the largest value."""
    from edgediffusion.optimize.passes._simulation import add_functions, function_name

    text = """<ir_version: 10, opset_import: ["": 23]>
        g (float[n] x, float scale) => (float[n] y) { y = Identity (x) }"""
    model = ir.from_onnx_text(text)
    add_functions(model, [form])
    proto = ir.to_proto(model)
    proto.graph.node[0].CopyFrom(onnx.helper.make_node(function_name(form), ["x", "scale"], ["y"], domain="edgediffusion"))
    values = np.array(MAGNITUDES[form], np.float32)
    ties = np.concatenate([(values[1:] + values[:-1]) / 2, values, np.nextafter((values[1:] + values[:-1]) / 2, np.float32(99))])
    x = np.concatenate([ties, -ties, np.random.default_rng(0).standard_normal(1000).astype(np.float32) * values[-1]])
    for scale in (np.float32(1), np.float32(0.3)):
        session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"x": x * scale, "scale": np.asarray(scale)})
        np.testing.assert_array_equal(found, round_to(x * scale / scale, form) * scale, strict=True)


@pytest.mark.parametrize("activations", ["nvfp4", "float"])
def test_simulated_nvfp4_is_the_formulas(weights, x, activations):
    states = _states(weights, x)
    model = _made(weights, states, Recipe("r", "nvfp4", activations), SIMULATED)

    def read_input(name, values):
        return _nvfp4(values, nvfp4_tensor_scale(_amax(states[name]))) if activations == "nvfp4" else values

    def read_weight(name, values):
        return _nvfp4(values, nvfp4_tensor_scale(np.abs(values).max()))

    _close(_run(model, x), _expected(weights, x, read_input, read_weight))


@pytest.mark.parametrize("form", MAGNITUDES)
def test_simulated_formats_with_one_scale_are_the_formulas(weights, x, form):
    states = _states(weights, x, input_clip=0.7)
    model = _made(weights, states, Recipe("r", form, form), SIMULATED)

    def read_input(name, values):
        return read_float4(values, _amax(states[name]), form)

    def read_weight(name, values):
        return read_float4(values, np.abs(values).max(1)[:, None], form)

    _close(_run(model, x), _expected(weights, x, read_input, read_weight))


def test_the_formats_of_fp4_are_those_of_the_state(weights, x):
    states = {name: replace(state, formats=("e1m2", "e3m0")) for name, state in _states(weights, x).items()}
    model = _made(weights, states, Recipe("r", "fp4", "fp4"), SIMULATED)
    assert [function.name for function in model.functions] == ["ReadE3M0"]
    expected = _made(weights, states, Recipe("r", "e1m2", "e3m0"), SIMULATED)
    _close(_run(model, x), _run(expected, x), 0, behind=0)


def test_simulated_fp8_rounds_to_e4m3(weights, x):
    states = _states(weights, x)
    found = _run(_made(weights, states, Recipe("r", "fp8", "fp8"), SIMULATED), x)
    exact = _expected(weights, x, lambda _, v: v, lambda _, v: v)
    for one, other in zip(found, exact, strict=True):  # E4M3 is wrong by at most 1/16 of each value
        assert 0.001 < np.linalg.norm(one - other) / np.linalg.norm(other) < 0.06


@pytest.mark.parametrize("recipe", [Recipe("r", "nvfp4", "nvfp4"), Recipe("r", "e2m1", "e2m1")], ids=lambda r: r.weights)
def test_simulation_in_a_float16_graph(weights, x, recipe):
    states = _states(weights, x)
    found = _run(_made(weights, states, recipe, SIMULATED, np.float16), x.astype(np.float16), optimize=False)
    wide = _run(_made(weights, states, recipe, SIMULATED), x)
    assert found[0].dtype == np.float16
    _close(found, wide, 0.05, behind=0.1)  # values near a tie fall to either side


def test_nvfp4_for_tensorrt_has_its_operators_and_the_same_codes(weights, x):
    model = _made(weights, _states(weights, x), Recipe("r", "nvfp4", "nvfp4"), TENSORRT)
    ops = [node.op_type for node in model.graph.node]
    assert ops.count("TRT_FP4DynamicQuantize") == 2, "what two layers read is quantized once"
    assert ops.count("DequantizeLinear") == 2 * (2 + 3)
    assert {entry.domain: entry.version for entry in model.opset_import}["trt"] == 1
    for tensor in model.graph.initializer:
        if tensor.name == "first.weight.codes":
            assert tensor.data_type == onnx.TensorProto.FLOAT4E2M1
            weight = weights["first"]
            scale = nvfp4_tensor_scale(np.abs(weight).max())
            values = nvfp4_values(weight, nvfp4_block_scales(weight, scale), scale)
            np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor).astype(np.float32), values.T)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_nvfp4_in_a_graph_of_16_bits_has_scales_of_that_type(weights, x, dtype):
    """TensorRT's strongly typed products want both sides in one type."""
    model = _made(weights, _states(weights, x), Recipe("r", "nvfp4", "nvfp4"), TENSORRT, dtype)
    scales = [onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name.endswith("scale")]
    assert {scale.dtype for scale in scales} == {np.dtype(dtype)}
    assert all(scale > 0 for scale in scales)


def test_nvfp4_declines_with_reasons(weights, x):
    text = """<ir_version: 10, opset_import: ["": 23]>
        network (float[n, 32, 4, 4] x) => (float[n, 32, 4, 8] y) {
          a = Conv (x, conv_weight)
          turned = Transpose <perm = [1, 0]> (four_weight)
          b = MatMul (a, turned)
          y = MatMul (b, deep_weight) }"""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    shapes = {"conv": (32, 32, 1, 1), "four": (16, 4), "deep": (16, 8)}
    for node in proto.graph.node:
        node.input[:] = [name.replace("_weight", ".weight") for name in node.input]
    for name, shape in shapes.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), f"{name}.weight"))
    one = np.ones(4, np.float32)
    states = dict.fromkeys(shapes, LayerState(one, -one, one, -one, one, one))
    report = insert_qdq(ir.from_proto(proto), states, Recipe("r", "nvfp4", "nvfp4"), TENSORRT)
    assert "matrix products" in report.declined["conv"]
    assert "no whole blocks of 16" in report.declined["four"]
    assert "two or three axes" in report.declined["deep"]


def test_an_old_operator_set_is_refused(weights, x):
    model = ir.from_proto(_proto(weights))
    model.opset_imports[""] = 21
    with pytest.raises(ArgumentError, match=r"opset 21.*--opset 23"):
        insert_qdq(model, _states(weights, x), Recipe("r", "nvfp4", "nvfp4"), TENSORRT)


@pytest.mark.parametrize(
    ("recipe", "placement", "lacking"),
    [
        (Recipe("r", "nvfp4", "nvfp4"), "onnxruntime-cpu", "nvfp4"),
        (Recipe("r", "nvfp4", "float"), "openvino", "nvfp4"),
        (Recipe("r", "fp4", "fp4"), "tensorrt", "fp4"),
        (Recipe("r", "int8", "int8", dynamic="token"), "tensorrt", "dynamic = 'token'"),
    ],
)
def test_engines_without_kernels_are_refused_and_simulation_is_offered(recipe, placement, lacking):
    with pytest.raises(ArgumentError, match=rf"no kernels.*Got: {lacking}.*--placement simulated"):
        check_formats(recipe, load_placement(placement))


@pytest.mark.parametrize(
    ("recipe", "target", "runs"),
    [("nvfp4", "rtx-5090", True), ("nvfp4", "rtx-4090", False), ("fp8", "rtx-4090", True), ("fp8", "rtx-3060", False)],
)
def test_a_device_without_the_format_is_refused(recipe, target, runs):
    if runs:
        check_device(load_recipe(recipe), targets.load(target))
        return
    with pytest.raises(ArgumentError, match=rf"'{target}' has no kernels.*Got: {recipe}\."):
        check_device(load_recipe(recipe), targets.load(target))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('weights = "nvfp4"\nactivations = "int8"', "activations 'nvfp4', 'float'"),
        ('weights = "fp4"\nactivations = "nvfp4"', "weights = 'fp4'"),
        ('weights = "e2m1"\nactivations = "e3m0"\nrounding = "gptq"', "rounding 'nearest'"),
        ('weights = "nvfp4"\nactivations = "nvfp4"\nranges = "mse"', "ranges 'max'"),
        ('weights = "fp4"\nactivations = "float"\nrank = 8', "rank 0"),
        ('weights = "int8"\nactivations = "int8"\ndynamic = "row"', "dynamic"),
        ('weights = "int8"\nactivations = "float"\ndynamic = "token"', "found at run time"),
        ('weights = "int8"\nactivations = "int8"\ndynamic = "token"\nrounding = "adaround"', "rounding 'nearest', 'gptq'"),
        ('weights = "int8"\nactivations = "int4"\ndynamic = "tensor"', "activations 'int8'"),
        ('weights = "int8"\nactivations = "int8"\ndynamic = "tensor"\ngroup = 64', "Leave out group"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(tmp_path, text, message):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ArgumentError, match=message):
        load_recipe(str(file))


def _token(values, groups, levels=255):
    parts = values.reshape(*values.shape[:-1], groups, -1)
    low, high = parts.min(-1, keepdims=True), parts.max(-1, keepdims=True)
    step = np.maximum((high - low) / np.float32(levels), np.float32(1e-8))
    return (low + step * np.rint((parts - low) / step)).reshape(values.shape)


@pytest.mark.parametrize("group", [0, 32, 16])
@pytest.mark.parametrize(("weight_kind", "activation_kind"), [("int8", "int8"), ("int4", "int8"), ("int4", "int4")])
def test_ranges_by_token_and_group_are_the_formulas(weights, x, group, weight_kind, activation_kind):
    recipe = Recipe("r", weight_kind, activation_kind, dynamic="token", group=group)
    bits, levels = (8 if weight_kind == "int8" else 4), (255 if activation_kind == "int8" else 15)
    states = {}
    for name, state in _states(weights, x).items():
        groups = recipe.groups(weights[name].shape)
        amax = np.abs(weights[name]).reshape(len(weights[name]), groups, -1).max(2)
        states[name] = replace(state, weight_amax=amax if groups > 1 else amax[:, 0])
    model = _made(weights, states, recipe, CPU)
    counts = [node.op_type for node in model.graph.node]
    what = "Groups" if group else "Tokens"
    assert (counts.count(f"Quantize{what}"), counts.count(f"Multiply{what}"), len(counts)) == (2, 3, 2 + 3 + 2)
    assert {function.name for function in model.functions} == {f"Quantize{what}", f"Multiply{what}"}

    def read_weight(name, values):
        scale = weight_scale(states[name].weight_amax.reshape(len(values), -1), bits)
        return weight_codes(values, scale, bits) * np.repeat(scale, values.shape[1] // scale.shape[1], 1)

    def read_input(name, values):
        return _token(values, recipe.groups((1, values.shape[-1])), levels)

    # A value that lies between two codes may fall to either side once the layer before is summed in another order.
    _close(_run(model, x), _expected(weights, x, read_input, read_weight), 2e-3)


def test_tokens_of_unequal_size_keep_their_codes(weights, x):
    """A token 300 times smaller than another has no codes left under one range for all."""
    x = x * np.array([1, 10, 1, 1, 1], np.float32)[:, None]
    exact = _expected(weights, x, lambda _, v: v, lambda _, v: v)[1]
    errors = {}
    for way in ("tensor", "token"):
        found = _run(_made(weights, _states(weights, x), Recipe("r", "int8", "int8", dynamic=way), CPU), x)[1]
        errors[way] = np.abs(found - exact)[:, -1].mean() / np.abs(exact[:, -1]).mean()
    assert errors["token"] < 0.05 < errors["tensor"]


def test_one_range_for_a_tensor_runs_in_one_kernel(weights, x, tmp_path):
    model = _made(weights, _states(weights, x), Recipe("r", "int8", "int8", dynamic="tensor"), CPU)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"], disabled_optimizers=["MatMulAddFusion"]
    )
    left = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert left & {"MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
    assert not left & {"MatMul", "Gemm", "MatMulInteger"}
    found, exact = _run(model, x), _expected(weights, x, lambda _, v: v, lambda _, v: v)
    _close(found, exact, 0.03, behind=0.03)


@pytest.mark.parametrize("way", ["tensor", "token"])
def test_ranges_at_run_time_in_a_float16_graph(weights, x, way):
    recipe = Recipe("r", "int8", "int8", dynamic=way)
    found = _run(_made(weights, _states(weights, x), recipe, CPU, np.float16), x.astype(np.float16))
    _close(found, _run(_made(weights, _states(weights, x), recipe, CPU), x), 0.01)


def test_a_bias_of_gptq_stays_behind_the_product(weights, x):
    bias = np.full(96, 0.5, np.float32)
    states = _states(weights, x)
    states["first"] = replace(states["first"], bias=bias)
    found = _run(_made(weights, states, Recipe("r", "int8", "int8", dynamic="token"), CPU), x)
    exact = _expected({**weights, "bias": bias}, x, lambda _, v: v, lambda _, v: v)
    _close(found, exact, 0.02)


@pytest.mark.parametrize("way", ["tensor", "token"])
def test_a_gemm_keeps_its_bias_and_one_that_scales_is_declined(weights, x, way):
    """As torch exports linear layers of two axes, with the weight [out, in]."""
    text = """<ir_version: 10, opset_import: ["": 23]>
        network (float[n, 64] x) => (float[n, 96] y) {{ y = Gemm <transB = 1{more}> (x, weight, bias) }}"""
    state, rows = _states(weights, x)["first"], x.reshape(-1, 64)
    found = {}
    for more in ("", ", alpha = 2.0"):
        proto = onnx.parser.parse_model(text.format(more=more))
        proto.graph.node[0].input[1] = "first.weight"
        tensors = {"first.weight": weights["first"], "bias": weights["bias"]}
        proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in tensors.items())
        model = ir.from_proto(proto)
        found[more] = insert_qdq(model, {"first": state}, Recipe("r", "int8", "int8", dynamic=way), CPU)
        if not more:
            session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
            exact = rows @ weights["first"].T + weights["bias"]
            assert np.linalg.norm(session.run(None, {"x": rows})[0] - exact) < 0.02 * np.linalg.norm(exact)
    assert found[""].quantized == ("first",)
    assert "scales" in found[", alpha = 2.0"].declined["first"]


def test_the_choice_of_a_format_survives_saving(weights, x, tmp_path):
    from edgediffusion.optimize.state import QuantizationState

    form, amax = choose_weight_format(weights["first"], np.ones(1), ("e1m2", "e3m0"), search=False)
    layer = replace(_states(weights, x)["first"], formats=(form, "e2m1"), weight_amax=amax)
    QuantizationState("", {}, {"unet/first": layer}).save(tmp_path / "state")
    assert QuantizationState.load(tmp_path / "state").layers["unet/first"].formats == (form, "e2m1")


@pytest.mark.parametrize(("ranges", "activations"), [("max", "fp4"), ("mse", "fp4"), ("mse", "float")])
def test_calibration_chooses_formats_by_what_layers_hold_and_see(weights, x, ranges, activations):
    """Powers of two get powers of two, what is spread evenly equal steps; weights and inputs."""
    torch = pytest.importorskip("torch")
    from edgediffusion.optimize.measure import measure

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.even = torch.nn.Linear(64, 48), torch.nn.Linear(64, 48)

        def forward(self, x, z):
            return self.wide(x) + self.even(z)

    rng, network = np.random.default_rng(0), Network()
    wide, even = 2.0 ** -rng.integers(0, 6, (48, 64)), rng.uniform(-1, 1, (48, 64))
    with torch.no_grad():
        network.wide.weight.copy_(torch.from_numpy(wide))
        network.even.weight.copy_(torch.from_numpy(even))
    items = []
    for step in range(4):
        feeds = {"x": rng.uniform(-1, 1, (2, 5, 64)), "z": 2.0 ** -rng.integers(0, 6, (2, 5, 64))}
        items.append((step, {name: array.astype(np.float32) for name, array in feeds.items()}))
    layers = measure(network, items, Recipe("r", "fp4", activations, balance="none", ranges=ranges, exclude=("^none$",)))
    # With float inputs the error of a weight counts alone; with "mse" the largest inputs are cut, so theirs may be any.
    assert (layers["wide"].formats[0], layers["even"].formats[0]) == ("e3m0", "e1m2")
    if ranges == "max":
        assert (layers["wide"].formats[1], layers["even"].formats[1]) == ("e1m2", "e3m0")
    if activations == "float":
        assert layers["wide"].formats[1] == ""


def test_nvfp4_beside_a_float_branch_keeps_large_directions(weights, x):
    """SVDQuant's NVFP4: what is left of the weight has smaller blocks; a layer that is declined gets no branch."""
    from edgediffusion.optimize.low_rank import low_rank
    from edgediffusion.optimize.quantize import quantize_model

    rng = np.random.default_rng(0)
    strong = weights | {"first": weights["first"] + 5 * np.outer(rng.standard_normal(96), rng.standard_normal(64)).astype(np.float32)}
    exact = _expected(strong, x, lambda _, v: v, lambda _, v: v)[0]
    errors, plain = {}, _states(strong, x)
    up, down = low_rank(strong["first"], 4, 4, np.ones((1, 64)), read=read_nvfp4)
    rest = np.abs(strong["first"] - up @ down).max(1)
    branched = plain | {"first": replace(plain["first"], up=up, down=down, weight_amax=rest)}
    for name, states in (("plain", plain), ("branch", branched)):
        model = ir.from_proto(_proto(strong))
        quantize_model(model, states, Recipe("r", "nvfp4", "float"), SIMULATED)
        errors[name] = np.linalg.norm(_run(ir.to_proto(model), x)[0] - exact)
    assert errors["branch"] < 0.7 * errors["plain"]
    model = ir.from_proto(_proto(strong))
    quantize_model(model, branched, Recipe("r", "nvfp4", "float", exclude=("first",)), SIMULATED)
    assert not any(name.startswith("first.down") for name in model.graph.initializers)


def test_a_graph_alone_cannot_choose_formats_of_inputs():
    from edgediffusion.optimize.measure import check_graph_recipe

    check_graph_recipe(load_recipe("nvfp4"))
    check_graph_recipe(Recipe("r", "e2m1", "e2m1"))
    with pytest.raises(ArgumentError, match="choice of a format"):
        check_graph_recipe(Recipe("r", "fp4", "fp4"))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tensorrt_multiplies_nvfp4(weights, x, dtype):
    """TensorRT-RTX builds without a GPU; its log lists the layers (test_placements.py has more)."""
    library = pytest.importorskip("tensorrt_rtx")
    model = _made(weights, _states(weights, x), Recipe("r", "nvfp4", "nvfp4"), TENSORRT, dtype)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    lines = _tensorrt_log(library, model, "SM120")
    products = [line for line in lines if "LayerType: gemm" in line]
    assert len(products) == 3
    assert all(line.count("FP4E2M1") == 2 for line in products), "both sides of every product"
    assert _tensorrt_log(library, model, "SM89") is None


def _tensorrt_log(library, model, capability):
    """What TensorRT-RTX says of the layers that it builds, or None if it refuses."""
    lines = []

    class Log(library.ILogger):
        def __init__(self):
            library.ILogger.__init__(self)

        def log(self, severity, message):
            lines.extend(message.splitlines())

    log = Log()
    builder = library.Builder(log)
    network = builder.create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert library.OnnxParser(network, log).parse(model.SerializeToString())
    config = builder.create_builder_config()
    config.profiling_verbosity = library.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(library.ComputeCapability, capability), 0)
    return lines if builder.build_serialized_network(network, config) is not None else None
