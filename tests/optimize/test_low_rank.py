"""The float branch beside a quantized weight: its formulas (METHODS 7.6), and that graph and torch compute the same."""

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from edgediffusion.optimize.integers import spread, weight_codes, weight_scale
from edgediffusion.optimize.low_rank import low_rank
from edgediffusion.optimize.measure import measure
from edgediffusion.optimize.passes.add_low_rank import add_low_rank, places
from edgediffusion.optimize.passes.insert_qdq import insert_qdq
from edgediffusion.optimize.recipe import Placement, Recipe
from edgediffusion.optimize.simulate import simulated
from edgediffusion.optimize.state import QuantizationState

RECIPE = Recipe("svdquant", "int4", "int8", balance="smoothquant", rank=4)
CHANNELS = Placement("channels", "uint8", ("MatMul", "Gemm"), channel_scales=True, int4="int8")
PLAIN = Placement("plain", "uint8", ("MatMul", "Gemm"), int4="int8")


@pytest.fixture
def weight():
    """Two directions stand out of the noise."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((24, 32))
    return (noise + 9 * np.outer(rng.standard_normal(24), rng.standard_normal(32)) + 5 * np.outer(noise[:, 0], noise[1])).astype(np.float32)


def lost(weight, up, down):
    rest = weight - up @ down
    scale = weight_scale(np.abs(rest).max(1), 4)
    return float(np.square(rest - weight_codes(rest, scale, 4) * spread(scale, rest.shape)).sum())


def test_a_branch_of_full_rank_loses_nothing(weight):
    assert lost(weight, *low_rank(weight, 24, 4, np.ones((1, 32)))) < 1e-6 * np.square(weight).sum()


def test_the_error_falls_with_the_rank(weight):
    errors = [lost(weight, *low_rank(weight, rank, 4, np.ones((1, 32)))) for rank in (1, 2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.3 * lost(weight, np.zeros((24, 1)), np.zeros((1, 32)))


def test_alternating_is_never_worse_than_the_first_decomposition(weight):
    u, values, v = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    first = lost(weight, u[:, :4] * values[:4], v[:4])
    assert lost(weight, *low_rank(weight, 4, 4, np.ones((1, 32)))) <= first
    assert np.square(weight - (u[:, :4] * values[:4]) @ v[:4]).sum() == pytest.approx(np.square(values[4:]).sum(), rel=1e-4)


class Network(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.linear = torch.nn.Linear(32, 24)
        with torch.no_grad():
            self.linear.weight.copy_(torch.from_numpy(weight))
            self.linear.bias.copy_(torch.arange(24) / 10)

    def forward(self, sample):
        return torch.relu(self.linear(sample))


@pytest.fixture
def items():
    rng = np.random.default_rng(1)
    scale = np.linspace(0.1, 4, 32).astype(np.float32)
    return [(i, {"sample": rng.standard_normal((2, 7, 32), np.float32) * scale}) for i in range(8)]


def _graph(weight):
    proto = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 21]>
        network (float[n, 7, 32] sample) => (float[n, 7, 24] y)
        { turned = Transpose <perm = [1, 0]> (w) product = MatMul (sample, turned) sum = Add (product, b) y = Relu (sum) }
        """)
    proto.graph.node[0].input[0] = "linear.weight"
    bias = (np.arange(24) / 10).astype(np.float32)
    proto.graph.initializer.extend([onnx.numpy_helper.from_array(weight, "linear.weight"), onnx.numpy_helper.from_array(bias, "b")])
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


@pytest.mark.parametrize("placement", [CHANNELS, PLAIN], ids=lambda p: p.name)
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_the_graph_computes_what_torch_learned_with(weight, items, placement, rounding):
    network = Network(weight)
    states = measure(network, items, replace(RECIPE, rounding=rounding))
    model = _graph(weight)
    branches = places(model, states)
    assert insert_qdq(model, states, RECIPE, placement).quantized == ("linear",)
    add_low_rank(model, branches)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = items[3][1]
    if rounding == "nearest":
        with torch.no_grad(), simulated(network, states, {"linear": (4, 8)}):
            expected = network(torch.from_numpy(feed["sample"])).numpy()
        np.testing.assert_allclose(session.run(None, feed)[0], expected, atol=1e-3 * np.abs(expected).max())
    exact = Network(weight)(torch.from_numpy(feed["sample"])).detach().numpy()
    without = measure(Network(weight), items, replace(RECIPE, rank=0))
    with torch.no_grad(), simulated(network, without, {"linear": (4, 8)}):
        plain = network(torch.from_numpy(feed["sample"])).numpy()
    assert np.linalg.norm(session.run(None, feed)[0] - exact) < 0.6 * np.linalg.norm(plain - exact)


def test_a_state_keeps_its_branches(weight, items, tmp_path):
    states = measure(Network(weight), items, RECIPE)
    QuantizationState("w", {}, states).save(tmp_path / "state")
    read = QuantizationState.load(tmp_path / "state").layers["linear"]
    np.testing.assert_array_equal(read.down, states["linear"].down)
    assert read.up.shape == (24, 4)


def test_eight_bits_and_floats_get_no_branch(weight, items):
    for recipe in (replace(RECIPE, weights="int8"), replace(RECIPE, exclude=("linear",))):
        assert measure(Network(weight), items, recipe)["linear"].down is None
