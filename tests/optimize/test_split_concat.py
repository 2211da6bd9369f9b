"""Convolutions split where they read a concatenation: the graph, the module, and what it is worth."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from edgediffusion.optimize.integers import affine
from edgediffusion.optimize.measure import measure
from edgediffusion.optimize.passes.insert_qdq import insert_qdq
from edgediffusion.optimize.passes.split_concat import joined, split_concat
from edgediffusion.optimize.recipe import Placement, Recipe
from edgediffusion.optimize.split import split_module

MODEL = """
<ir_version: 10, opset_import: ["": 21]>
network (float[n, 4, 6, 6] deep, float[n, 2, 6, 6] skip) => (float[n, 5, 6, 6] y)
{
  both = Concat <axis = 1> (deep, skip)
  a = Conv (both, shortcut_weight, shortcut_bias)
  gate = Sigmoid (both)
  active = Mul (both, gate)
  b = Conv <pads = [1, 1, 1, 1]> (active, first_weight)
  relu = Relu (b)
  c = Conv <pads = [1, 1, 1, 1]> (relu, second_weight)
  d = Add (a, b)
  y = Add (d, c)
}
"""
SPLIT = Recipe("split", "int8", "int8", balance="none", split=("shortcut$", "^first$", "^second$"))
CPU = Placement("cpu", "uint8", ("Conv",), ("Conv",))


class Network(torch.nn.Module):
    """The same in torch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.shortcut = torch.nn.Conv2d(6, 5, 1)
        self.first = torch.nn.Conv2d(6, 5, 3, padding=1, bias=False)
        self.second = torch.nn.Conv2d(5, 5, 3, padding=1, bias=False)

    def forward(self, deep, skip):
        both = torch.cat([deep, skip], 1)
        b = self.first(torch.nn.functional.silu(both))
        return self.shortcut(both) + b + self.second(torch.relu(b))


@pytest.fixture
def model():
    proto = onnx.parser.parse_model(MODEL)
    for node in proto.graph.node:  # the text format has no dots in names, checkpoints have
        node.input[:] = [name.replace("_weight", ".weight").replace("_bias", ".bias") for name in node.input]
    weights = {name: value.detach().numpy() for name, value in Network().named_parameters()}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


@pytest.fixture
def feeds():
    """A skip of a twentieth of the deep features' range."""
    rng = np.random.default_rng(0)
    return {"deep": rng.standard_normal((2, 4, 6, 6), np.float32), "skip": 0.05 * rng.standard_normal((2, 2, 6, 6), np.float32)}


def _run(model, feeds):
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)[0]


def test_what_reads_a_concatenation_is_found_through_an_activation_and_no_further(model):
    assert joined(model, SPLIT) == {"shortcut": (4, 2), "first": (4, 2)}


def test_a_layer_that_stays_float_stays_whole(model):
    assert set(joined(model, Recipe("r", "int8", "int8", split=SPLIT.split, exclude=("^first$",)))) == {"shortcut"}


def test_a_split_graph_computes_the_same(model, feeds):
    expected = _run(model, feeds)
    split_concat(model, joined(model, SPLIT))
    assert [node.op_type for node in model.graph].count("Conv") == 5
    assert {"shortcut.0.weight", "shortcut.1.weight", "first.0.weight", "first.1.weight"} < set(model.graph.initializers)
    assert "shortcut.weight" not in model.graph.initializers
    np.testing.assert_allclose(_run(model, feeds), expected, rtol=1e-5, atol=1e-5)


def test_a_split_module_computes_the_same_and_has_the_names_of_the_graph(model, feeds):
    network, tensors = Network(), {name: torch.from_numpy(array) for name, array in feeds.items()}
    expected = network(**tensors)
    split_module(network, joined(model, SPLIT))
    torch.testing.assert_close(network(**tensors), expected, rtol=1e-5, atol=1e-5)
    assert "shortcut.1" in dict(network.named_modules())


def test_a_half_with_a_range_of_its_own_golden():
    """METHODS 2.2: the error of the narrow half falls by the square of the ratio of the ranges."""
    rng = np.random.default_rng(0)
    wide, narrow = rng.standard_normal(20_000), 0.05 * rng.standard_normal(20_000)
    both = np.concatenate([wide, narrow])
    together = np.mean((affine(both.min(), both.max(), 8, signed=False)(narrow) - narrow) ** 2)
    apart = np.mean((affine(narrow.min(), narrow.max(), 8, signed=False)(narrow) - narrow) ** 2)
    ratio = (np.ptp(both) / np.ptp(narrow)) ** 2
    assert together / apart == pytest.approx(ratio, rel=0.1)


def test_quantized_apart_the_narrow_half_keeps_its_bits(model, feeds):
    """From the module to the graph: states of both parts, observed in torch, serve the layers of the split graph."""
    lost = {}
    expected = _run(model.clone(), feeds)
    for name, recipe in (("whole", Recipe("r", "int8", "int8", balance="none")), ("split", SPLIT)):
        network, graph = Network(), model.clone()
        sizes = joined(graph, recipe)
        with torch.no_grad():
            network.shortcut.weight[:, 4:] *= 20  # the skip counts as much as the rest
        split_module(network, sizes)
        states = measure(network, [(0, feeds)], recipe)
        for tensor in graph.graph.initializers.values():
            if tensor.name == "shortcut.weight":
                weight = tensor.const_value.numpy().copy()
                weight[:, 4:] *= 20
                tensor.const_value = ir.tensor(weight, name="shortcut.weight")
        expected = _run(graph.clone(), feeds)
        split_concat(graph, sizes)
        report = insert_qdq(graph, states, recipe, CPU)
        assert not report.declined
        lost[name] = np.linalg.norm(_run(graph, feeds) - expected)
    assert lost["split"] < 0.7 * lost["whole"]


def test_the_shortcuts_of_the_reference_unet(tmp_path):
    import edgediffusion
    from edgediffusion.export import export
    from edgediffusion.optimize.graph_file import load_graph

    bundle = export(Path(edgediffusion.__file__).parent / "reference" / "fashion", tmp_path / "bundle")
    model = load_graph(bundle.path / bundle.component("unet").model)
    found = joined(model, Recipe("r", "int8", "int8", split=("conv_shortcut$", r"up_blocks.*conv1$")))
    assert len(found) == 12
    assert found["up_blocks.1.resnets.1.conv_shortcut"] == found["up_blocks.1.resnets.1.conv1"] == (96, 64)
