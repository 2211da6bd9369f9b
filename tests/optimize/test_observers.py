"""Observers in ONNX graphs: their numbers are those of the tensors; that torch sees the same, test_calibrate.py checks."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime
import pytest

from edgediffusion.bundle import Bundle, Component, TensorSpec, write
from edgediffusion.errors import ArgumentError
from edgediffusion.optimize.calibrate import state_of
from edgediffusion.optimize.collect import Item
from edgediffusion.optimize.graph_layers import find_layers
from edgediffusion.optimize.items import Drawn
from edgediffusion.optimize.measure import check_graph_recipe, measure_graph
from edgediffusion.optimize.observers import OUTPUT, _write_graph, observe_graph
from edgediffusion.optimize.quantize import quantize
from edgediffusion.optimize.recipe import Recipe, load_recipe

# A convolution; two products that read one tensor, one with a bias behind it; a Gemm. Weights as torch's exporter leaves them, and
# `folded` as those leave them that fold the transposition: [in, out], under a name of the exporter's own.
MODEL = """
<ir_version: 8, opset_import: ["": OPSET]>
network (float[batch, 4, height, width] sample, float[1] timestep) => (float[n, m] out_sample)
{
  clock = Mul (timestep, thousandth)
  moved = Add (sample, clock)
  a = Conv <pads = [1, 1, 1, 1]> (moved, conv__weight, conv__bias)
  b = Relu (a)
  c = Reshape (b, tokens)
  d = Transpose <perm = [0, 2, 1]> (c)
  wide = Cast <to = 1> (linear__weight)
  turned = Transpose <perm = [1, 0]> (wide)
  e = MatMul (d, turned)
  f = Add (e, linear__bias)
  g = MatMul (d, folded)
  h = Add (f, g)
  i = Reshape (h, rows)
  out_sample = Gemm <transB = 1> (i, last__weight, last__bias)
}
"""
SHAPES = {
    "conv.weight": (5, 4, 3, 3),
    "conv.bias": (5,),
    "linear.weight": (3, 5),
    "linear.bias": (3,),
    "folded": (5, 3),
    "last.weight": (2, 3),
    "last.bias": (2,),
}
CONSTANTS = {"thousandth": np.float32([0.001]), "eight": np.array([0, 8, -1]), "tokens": np.array([0, 5, -1]), "rows": np.array([-1, 3])}
COMPONENT = Component(
    "unet",
    "denoise",
    "unet/model.onnx",
    (TensorSpec("sample", "float32", ("batch", 4, "height", "width")), TensorSpec("timestep", "float32", (1,))),
    (TensorSpec("out_sample", "float32", ("n", "m")),),
)
# What each layer reads and gives, and the axis of its channels.
SEEN = {"conv": ("moved", "a", 1), "linear": ("d", "f", -1), "folded": ("d", "g", -1), "last": ("i", "out_sample", -1)}
INT8 = Recipe("int8", "int8", "int8")
# A convolution that reads a concatenation, and a product of eight channels: one can be split, the other rotated.
JOINED = """
<ir_version: 8, opset_import: ["": 20]>
network (float[batch, 4, height, width] sample, float[1] timestep) => (float[n, m, k] out_sample)
{
  clock = Mul (timestep, thousandth)
  moved = Add (sample, clock)
  both = Concat <axis = 1> (sample, moved)
  a = Conv (both, conv__weight, conv__bias)
  b = Reshape (a, eight)
  c = Transpose <perm = [0, 2, 1]> (b)
  turned = Transpose <perm = [1, 0]> (linear__weight)
  out_sample = MatMul (c, turned)
}
"""


@pytest.fixture
def weights():
    rng = np.random.default_rng(0)
    made = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    return {**made, "linear.weight": made["linear.weight"].astype(np.float16), **CONSTANTS}


@pytest.fixture
def items():
    rng = np.random.default_rng(1)
    return [(i % 3, {"sample": rng.standard_normal((2, 4, 6, 5), np.float32), "timestep": np.float32([900 - i])}) for i in range(6)]


@pytest.fixture
def make(tmp_path, weights):
    """``make(opset=..., dtype=...)``: a bundle of the graph above, its weights in a file as foreign exporters write it."""

    def build(opset=20, dtype="float32"):
        proto = onnx.parser.parse_model(MODEL.replace("OPSET", str(opset)))
        for node in proto.graph.node:  # the text format has no dots in names, checkpoints have
            node.input[:] = [name.replace("__", ".") for name in node.input]
        component = COMPONENT
        if dtype == "float16":
            for value in (*proto.graph.input, *proto.graph.output):
                value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
            next(n for n in proto.graph.node if n.op_type == "Cast").attribute[0].i = onnx.TensorProto.FLOAT16
            component = replace(COMPONENT, inputs=tuple(replace(spec, dtype=dtype) for spec in COMPONENT.inputs))
        given = {name: a.astype(dtype) if a.dtype == np.float32 else a for name, a in weights.items()}
        proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in given.items())
        folder = tmp_path / f"bundle-{opset}-{dtype}"
        (folder / "unet").mkdir(parents=True)
        onnx.save(proto, folder / component.model, save_as_external_data=True, location="model.onnx.data", size_threshold=64)
        write(folder, family="foreign", components=(component,), sampling=None, history=())
        return Bundle.open(folder)

    return build


@pytest.fixture
def joined(tmp_path):
    proto = onnx.parser.parse_model(JOINED)
    for node in proto.graph.node:
        node.input[:] = [name.replace("__", ".") for name in node.input]
    rng = np.random.default_rng(3)
    shapes = {"conv.weight": (8, 8, 1, 1), "conv.bias": (8,), "linear.weight": (3, 8)}
    given = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    constants = {name: CONSTANTS[name] for name in ("thousandth", "eight")}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in {**given, **constants}.items())
    (tmp_path / "joined" / "unet").mkdir(parents=True)
    onnx.save(onnx.shape_inference.infer_shapes(proto), tmp_path / "joined" / COMPONENT.model)
    component = replace(COMPONENT, outputs=(TensorSpec("out_sample", "float32", ("n", "m", "k")),))
    write(tmp_path / "joined", family="foreign", components=(component,), sampling=None, history=())
    return Bundle.open(tmp_path / "joined")


def tensors(bundle, items):
    """Every tensor of the graph for every item, by ONNX's own reference."""
    model = onnx.load(bundle.path / "unet" / "model.onnx")
    session = onnx.reference.ReferenceEvaluator(model)
    dtype = np.float16 if bundle.components[0].inputs[0].dtype == "float16" else np.float32
    return [session.run(None, {name: a.astype(dtype) for name, a in feeds.items()}, intermediate=True) for _, feeds in items]


def by_channel(values, name, axis):
    return np.concatenate([np.moveaxis(v[name], axis, 0).reshape(v[name].shape[axis], -1) for v in values], 1).astype(np.float64)


@pytest.mark.parametrize(("opset", "dtype"), [(13, "float32"), (20, "float32"), (20, "float16")])
def test_numbers_are_those_of_the_tensors(make, items, weights, opset, dtype):
    bundle = make(opset, dtype)
    given = [(step, {name: array.astype(dtype) for name, array in feeds.items()}) for step, feeds in items]
    done = []
    found = observe_graph(bundle, COMPONENT, given, progress=done.append)
    values = tensors(bundle, items)
    # float32: the two engines sum in different orders; float16 rounds to 11 bits, layer after layer.
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    assert list(found) == list(SEEN)
    for name, (read, gives, axis) in SEEN.items():
        for channels, tensor in ((found[name].input, read), (found[name].output, gives)):
            expected = by_channel(values, tensor, axis)
            largest = np.abs(expected).max()
            np.testing.assert_allclose(channels.low, expected.min(1), atol=tolerance * largest)
            np.testing.assert_allclose(channels.high, expected.max(1), atol=tolerance * largest)
            np.testing.assert_allclose(channels.mean_square, (expected**2).mean(1), atol=tolerance * largest**2)
        for step in range(3):
            expected = np.abs(by_channel([v for v, (at, _) in zip(values, items, strict=True) if at == step], read, axis)).max(1)
            np.testing.assert_allclose(found[name].steps[step], expected, atol=tolerance * expected.max())
    assert {name: layer.readers for name, layer in found.items()} == {
        "conv": ("conv",),
        "linear": ("linear", "folded"),
        "folded": ("linear", "folded"),
        "last": ("last",),
    }
    np.testing.assert_array_equal(found["linear"].weight, weights["linear.weight"].astype(np.float32))
    np.testing.assert_array_equal(found["folded"].weight, weights["folded"].T.astype(dtype).astype(np.float32))
    assert done == [1, 2, 3, 4, 5, 6]


def test_only_statistics_leave_the_engine_and_nothing_stays(make, items, tmp_path):
    bundle = make()
    _write_graph(bundle.path / COMPONENT.model, tmp_path)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    (output,) = model.graph.output
    # Input and output of each layer by channel, the tensor that two products read once, three numbers each.
    assert [d.dim_value for d in output.type.tensor_type.shape.dim] == [3 * (4 + 5 + 5 + 3 + 3 + 3 + 2)]
    (tmp_path / "work").mkdir()
    observe_graph(bundle, COMPONENT, items, folder=tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())


def test_a_tensor_is_reduced_before_the_next_layer_runs(make, items, tmp_path):
    """Else all tensors of a network would lie in memory together: ONNX Runtime's order is not that of the file."""
    _write_graph(make().path / COMPONENT.model, tmp_path)
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    file, without = str(tmp_path / "model.onnx"), ["MatMulAddFusion"]  # as the engine opens it
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"], disabled_optimizers=without)
    session.run([OUTPUT], items[0][1])
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    ran = [e["args"]["op_name"] for e in events if e.get("cat") == "Node" and e["name"].endswith("kernel_time")]
    assert {op: ran[: ran.index(op)].count("ReduceMax") for op in ("Conv", "Gemm")} == {"Conv": 1, "Gemm": 6}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers_name_layer_and_step(make, items, value):
    items[4][1]["sample"][1, 2, 3, 4] = value
    with pytest.raises(ArgumentError, match=r"'conv' .* step 1"):
        observe_graph(make(), COMPONENT, items)


def test_a_graph_without_layers_is_refused(make, items):
    bundle = make()
    text = '<ir_version: 8, opset_import: ["": 20]> network (float[2] sample) => (float[2] y) {y = Relu (sample)}'
    onnx.save(onnx.parser.parse_model(text), bundle.path / COMPONENT.model)
    with pytest.raises(ArgumentError, match="no convolution or matrix product"):
        observe_graph(bundle, COMPONENT, items)


def test_a_foreign_bundle_goes_the_whole_way(make, items, tmp_path):
    """Without .safetensors, weights that are stored [in, out], a layer without a module's name: calibrated and quantized as any other."""
    bundle = make()
    drawn = Drawn(tuple(Item(step, "", feeds) for step, feeds in items), {"guidance_scale": 1.0, "seed": 0})
    state = state_of(bundle, None, drawn, INT8)
    assert state.calibration["observer"] == "onnxruntime"
    state.save(tmp_path / "state")
    quantized = quantize(bundle, tmp_path / "state", tmp_path / "int8")
    assert quantized.history[-1].arguments["layers"] == {"unet": {"quantized": 4, "float": {}}}
    assert sorted(p.name for p in (quantized.path / "unet").iterdir()) == ["model.onnx", "quantized.safetensors"]
    found, expected = (
        onnxruntime.InferenceSession(str(b.path / "unet" / "model.onnx"), providers=["CPUExecutionProvider"]).run(None, items[0][1])[0]
        for b in (quantized, bundle)
    )
    # Four int8 tensors in a row, each wrong by at most half of 1/127 of its range: 3 % of the result's norm is ample.
    assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)


def test_layers_that_a_recipe_splits_and_rotates_are_observed_so(joined, items):
    recipe = replace(INT8, split=("conv",), rotate=("linear",))
    states = measure_graph(joined, joined.components[0], items, recipe)
    assert list(states) == ["conv.0", "conv.1", "linear.1"]
    samples = np.stack([feeds["sample"] for _, feeds in items])
    clocks = np.float32([0.001]) * np.stack([feeds["timestep"] for _, feeds in items]).reshape(-1, 1, 1, 1, 1)
    np.testing.assert_array_equal(states["conv.0"].input_high, samples.max((0, 1, 3, 4)))
    np.testing.assert_allclose(states["conv.1"].input_high, (samples + clocks).max((0, 1, 3, 4)), rtol=1e-6)
    plain = measure_graph(joined, joined.components[0], items, INT8)["linear"]
    assert (states["linear.1"].input_high != plain.input_high).all()
    np.testing.assert_allclose(states["linear.1"].output_high, plain.output_high, rtol=1e-5)  # a rotation changes no output


def test_the_orientation_of_weights(make):
    layers = {layer.name: layer for layer in find_layers(ir.load(make().path / COMPONENT.model).graph)}
    assert {name: (layer.transposed, layer.turned, layer.channels) for name, layer in layers.items()} == {
        "conv": (False, False, (4, 5)),
        "linear": (True, False, (5, 3)),
        "folded": (True, True, (5, 3)),
        "last": (False, False, (3, 2)),
    }


@pytest.mark.parametrize(
    ("recipe", "needs"),
    [
        (replace(INT8, weights="int4", rounding="adaround"), "rounding 'adaround'"),
        (load_recipe("w4a8"), "rounding 'straight-through'"),
        (replace(INT8, ranges="modelopt-max"), "ranges 'modelopt-max'"),
        (Recipe("w4a4", "int4", "int4", ranges="mse"), "ranges 'mse' of int4 activations"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_methods_that_need_torch_are_refused_with_what_to_do(recipe, needs):
    with pytest.raises(ArgumentError, match=rf"{needs}.*--source FOLDER"):
        check_graph_recipe(recipe)


@pytest.mark.parametrize("balance", ["none", "smoothquant", "csb", "search"])
def test_every_balance_works_on_graphs(make, items, balance):
    recipe = Recipe("w4", "int4", "int8", balance=balance, ranges="mse")
    states = measure_graph(make(), COMPONENT, items, recipe)
    np.testing.assert_array_equal(states["linear"].factors, states["folded"].factors)
    assert bool((states["conv"].factors != 1).any()) == (balance != "none")
