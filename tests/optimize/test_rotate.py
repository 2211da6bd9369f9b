"""Rotated layers: the matrix, and that graph and module stay the same functions."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from edgediffusion.optimize.measure import measure
from edgediffusion.optimize.passes.insert_qdq import insert_qdq
from edgediffusion.optimize.passes.rotate import hadamard, rotatable, rotate
from edgediffusion.optimize.recipe import Placement, Recipe
from edgediffusion.optimize.rotation import rotate_module
from edgediffusion.optimize.simulate import simulated

RECIPE = Recipe("r", "int4", "int8", balance="none", rotate=("^[ab]$", "^odd$"))
CPU = Placement("cpu", "uint8", ("MatMul", "Gemm"), int4="int8")


class Network(torch.nn.Module):
    """Two layers that read one tensor, and one with too odd a width."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.odd = torch.nn.Linear(16, 6), torch.nn.Linear(16, 6), torch.nn.Linear(6, 3)
        with torch.no_grad():
            self.a.weight[:, 3] *= 0.05
            self.b.weight[:, 3] *= 0.05

    def forward(self, sample):
        return self.odd(self.a(sample) + self.b(sample))


@pytest.fixture
def model():
    proto = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 21]>
        network (float[n, 5, 16] sample) => (float[n, 5, 3] y)
        {
          at = Transpose <perm = [1, 0]> (a_weight) c = MatMul (sample, at) d = Add (c, a_bias)
          bt = Transpose <perm = [1, 0]> (b_weight) e = MatMul (sample, bt) f = Add (e, b_bias)
          g = Add (d, f)
          ot = Transpose <perm = [1, 0]> (odd_weight) h = MatMul (g, ot) y = Add (h, odd_bias)
        }
        """)
    for node in proto.graph.node:
        node.input[:] = [name.replace("_weight", ".weight").replace("_bias", ".bias") for name in node.input]
    weights = {name: value.detach().numpy() for name, value in Network().named_parameters()}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


@pytest.fixture
def items():
    """One channel is far wider than the rest, as in transformers, and counts little."""
    rng = np.random.default_rng(0)
    scale = np.where(np.arange(16) == 3, 10, 1).astype(np.float32)
    return [(i, {"sample": rng.standard_normal((2, 5, 16), np.float32) * scale}) for i in range(6)]


def _run(model, feed):
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)[0]


@pytest.mark.parametrize("channels", [4, 8, 12, 96, 128])
def test_the_matrix_is_orthogonal_and_symmetric(channels):
    h = hadamard(channels)
    np.testing.assert_allclose(h @ h, np.eye(channels), atol=1e-6)
    np.testing.assert_array_equal(h, h.T)


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_odd_widths_have_no_matrix(channels):
    assert hadamard(channels) is None


def test_a_rotated_graph_computes_the_same_and_turns_a_tensor_once(model, items):
    expected = _run(model, items[0][1])
    assert rotatable(model, RECIPE) == ["a", "b"]
    rotate(model, ["a", "b"])
    assert sum(node.outputs[0].name.endswith(".rotated") for node in model.graph) == 1
    np.testing.assert_allclose(_run(model, items[0][1]), expected, rtol=1e-4, atol=1e-4)


def test_a_rotated_module_computes_the_same(items):
    network, sample = Network(), torch.from_numpy(items[0][1]["sample"])
    expected = network(sample)
    rotate_module(network, ["a", "b"])
    torch.testing.assert_close(network(sample), expected, rtol=1e-4, atol=1e-4)


def test_an_outlier_costs_the_other_channels_less(model, items):
    """From torch to the graph: the state of the rotated layers serves the rotated graph, and 4-bit activations lose less."""
    recipe = Recipe("r", "int8", "int4", balance="none")
    feed, lost = items[0][1], {}
    exact = _run(model.clone(), feed)
    for name in ("plain", "rotated"):
        network, graph = Network(), model.clone()
        if name == "rotated":
            rotate_module(network, ["a", "b"])
            rotate(graph, ["a", "b"])
        states = measure(network, items, recipe)
        assert not insert_qdq(graph, states, recipe, CPU).declined
        found = _run(graph, feed)
        bits = dict.fromkeys(states, (8, 4))
        with torch.no_grad(), simulated(network, states, bits):
            np.testing.assert_allclose(found, network(torch.from_numpy(feed["sample"])).numpy(), rtol=0.05, atol=0.05)
        lost[name] = np.linalg.norm(found - exact)
    assert lost["rotated"] < 0.7 * lost["plain"]
