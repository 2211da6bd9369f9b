"""Sensitivity on a small network: its errors are those of one layer at a time, and what the report keeps float is kept."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgediffusion import bundle as bundles
from edgediffusion.bundle import Bundle, Component, TensorSpec
from edgediffusion.errors import ArgumentError, BundleError, OutputError
from edgediffusion.optimize import quantize
from edgediffusion.optimize.finite import check_finite, noise_feeds
from edgediffusion.optimize.items import Drawing, draw_items
from edgediffusion.optimize.measure import measure
from edgediffusion.optimize.recipe import Recipe, load_placement
from edgediffusion.optimize.sensitivity import Request, sensitivity
from edgediffusion.optimize.sensitivity_errors import Quantization, guided, layer_errors, quantized_layers
from edgediffusion.optimize.sensitivity_report import Sensitivity
from edgediffusion.optimize.sensitivity_times import marked_float, marked_quantized, ratio, time_in_turn
from edgediffusion.optimize.state import QuantizationState, weights_digest
from edgediffusion.runtimes.engines import NodeTime, onnxruntime
from tests.runtimes.tiny import DENOISE, ENCODE, SAMPLING, TOKENS, WIDTH, write_encoder, write_tokenizer

INT8 = Recipe("int8", "int8", "int8", balance="none")
CPU = load_placement("onnxruntime-cpu")
LAYERS = ("first", "middle", "last", "words")
PROMPTS = ("a red shirt", "a blue shoe")
REQUEST = Request(samples=4, runs=5, threads=1, prompts=PROMPTS)


class Network(torch.nn.Module):
    """Three convolutions and a linear layer; ``middle`` reads a channel that takes all 8 bits from the others."""

    def __init__(self, outlier: float = 60.0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = (torch.nn.Conv2d(a, b, 3, padding=1) for a, b in ((4, 8), (8, 8), (8, 4)))
        self.words = torch.nn.Linear(WIDTH, 8)
        with torch.no_grad():
            self.first.weight[0] *= outlier
            self.middle.weight[:, 0] /= outlier

    def forward(self, sample, timestep, encoder_hidden_states):
        x = torch.tanh(self.words(encoder_hidden_states.mean(1))[:, :, None, None] + timestep / 1000)
        return self.last(torch.relu(self.middle(torch.relu(self.first(sample)))) + x)


def write_network(folder, network):
    """The same as an ONNX file, its weights under the modules' names."""
    relu = [("first", "sample"), ("middle", "first_relu")]
    nodes = []
    for name, source in relu:
        nodes.append(helper.make_node("Conv", [source, f"{name}.weight", f"{name}.bias"], [name], name=f"node_{name}", pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [name], [f"{name}_relu"], name=f"node_{name}_relu"))
    nodes += [
        helper.make_node("ReduceMean", ["encoder_hidden_states", "token_axis"], ["said"], keepdims=0, name="node_said"),
        helper.make_node("Transpose", ["words.weight"], ["turned"], perm=[1, 0], name="node_turned"),
        helper.make_node("MatMul", ["said", "turned"], ["words"], name="node_words"),
        helper.make_node("Add", ["words", "words.bias"], ["meant"], name="node_meant"),
        helper.make_node("Unsqueeze", ["meant", "picture_axes"], ["everywhere"], name="node_everywhere"),
        helper.make_node("Mul", ["timestep", "per_mille"], ["clock"], name="node_clock"),
        helper.make_node("Add", ["everywhere", "clock"], ["shift"], name="node_shift"),
        helper.make_node("Tanh", ["shift"], ["shifted"], name="node_shifted"),
        helper.make_node("Add", ["middle_relu", "shifted"], ["sum"], name="node_sum"),
        helper.make_node("Conv", ["sum", "last.weight", "last.bias"], ["out_sample"], name="node_last", pads=[1, 1, 1, 1]),
    ]
    weights = {name: value.detach().numpy() for name, value in network.named_parameters()}
    weights |= {"per_mille": np.array(0.001, np.float32), "token_axis": np.array([1]), "picture_axes": np.array([2, 3])}

    def value(spec: TensorSpec):
        return helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, list(spec.shape))

    constants = [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "unet", [value(s) for s in DENOISE.inputs], [value(s) for s in DENOISE.outputs], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (folder / "unet").mkdir()
    (folder / "unet" / "model.onnx").write_bytes(model.SerializeToString())
    (folder / "unet" / "weights.safetensors").write_bytes(b"what the digest is of")


@pytest.fixture(scope="module")
def network():
    return Network().eval()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, network):
    folder = tmp_path_factory.mktemp("sensitivity") / "bundle"
    folder.mkdir()
    write_encoder(folder)
    write_tokenizer(folder / ENCODE.tokenizer.file)
    write_network(folder, network)
    bundles.write(folder, family="tiny", components=(ENCODE, DENOISE), sampling=SAMPLING, history=())
    return Bundle.open(folder)


@pytest.fixture(scope="module")
def drawn(bundle):
    return draw_items(bundle, PROMPTS, Drawing("uniform", 12, 3, 0, 5.0, "ddim"))


@pytest.fixture(scope="module")
def items(drawn):
    return [item.feeds for item in drawn.items]


@pytest.fixture(scope="module")
def states(network, items):
    return measure(network, list(enumerate(items)), INT8, guidance_scale=5.0)


@pytest.fixture(scope="module")
def state(bundle, drawn, states):
    layers = {f"unet/{name}": layer for name, layer in states.items()}
    return QuantizationState(weights_digest(bundle, bundle.component("unet")), drawn.record, layers, INT8.to_json())


@pytest.fixture(scope="module")
def found(tmp_path_factory, bundle, state):
    return sensitivity(bundle, state, tmp_path_factory.mktemp("report") / "report.json", request=REQUEST)


# --- errors


def one_at_a_time(network, items, layers):
    """The relative change of the guided prediction with each layer's quantized form in the network."""
    feeds = [{name: torch.as_tensor(array) for name, array in item.items()} for item in items]
    found = {}
    with torch.no_grad():
        expected = torch.cat([guided(network(**feed), 5.0) for feed in feeds])
        for name, layer in layers.items():
            before = getattr(network, name)
            setattr(network, name, layer)
            changed = torch.cat([guided(network(**feed), 5.0) for feed in feeds]) - expected
            setattr(network, name, before)
            found[name] = float(changed.norm() / expected.norm())
    return found


def test_errors_of_all_layers_at_once_are_those_of_one_at_a_time(network, items, states):
    layers = quantized_layers(network, Quantization(states, INT8, CPU, LAYERS, ("first", "middle")))
    exact = one_at_a_time(network, items, layers)
    first_order = layer_errors(network, items, layers, guidance_scale=5.0, probes=32)
    assert sorted(LAYERS, key=exact.get) == sorted(LAYERS, key=first_order.get)
    for name in LAYERS:
        assert first_order[name] == pytest.approx(exact[name], rel=0.25)
    assert layer_errors(network, items, layers, guidance_scale=5.0, probes=32) == first_order
    assert all(parameter.requires_grad for parameter in network.parameters()), "the network is as it was"


def test_the_quantized_layer_is_what_the_graph_computes(bundle, network, items, states, found):
    """Errors in torch and of a graph for each layer are the same thing."""
    layers = quantized_layers(network, Quantization(states, INT8, CPU, LAYERS, ("first", "middle")))
    exact = one_at_a_time(network, items, layers)
    by_graph = {layer.name: layer.error for layer in found.layers}
    assert max(exact, key=exact.get) == max(by_graph, key=by_graph.get) == "middle"


def test_codes_and_biases_of_the_state_are_used(network, states):
    layer = replace(states["last"], codes=np.full((4, 8, 3, 3), 3, np.int8), bias=np.arange(4, dtype=np.float32))
    (made,) = quantized_layers(network, Quantization({"last": layer}, INT8, CPU, ("last",), ())).values()
    steps = layer.weight_amax / 127
    np.testing.assert_allclose(
        made.read_weight().detach().numpy(), np.broadcast_to(3 * steps[:, None, None, None], (4, 8, 3, 3)), rtol=1e-6
    )
    np.testing.assert_array_equal(made.bias.detach().numpy(), layer.bias)


# --- times


def test_marks_name_the_layers_that_a_node_serves(bundle, states):
    file = bundle.path / "unet/model.onnx"
    marked = marked_quantized(file, states, INT8, CPU)
    assert marked.quantized == set(LAYERS)
    assert marked.quantized_outputs == {"first", "middle"}
    quantizers = [node.name.split(".")[0] for node in marked.model.graph if node.op_type == "QuantizeLinear"]
    numbers = {name: f"layer<{marked.layers.index(name)}>" for name in LAYERS}
    assert sorted(quantizers) == sorted([numbers["first"], numbers["middle"]] * 2 + [numbers["last"], numbers["words"]])


def test_every_layer_has_times_in_both_profiles(tmp_path, bundle, states, items):
    file = bundle.path / "unet/model.onnx"
    for at, marked in enumerate((marked_float(file, INT8), marked_quantized(file, states, INT8, CPU))):
        ir.save(marked.model, tmp_path / f"{at}.onnx")
        (nodes,) = onnxruntime.time_nodes([tmp_path / f"{at}.onnx"], items[0], runs=3, threads=1)
        times = marked.times(nodes)
        assert set(times) == set(LAYERS), [node.name for node in nodes]
        assert all(len(runs) == 3 for runs in times.values())
        assert sum(runs.sum() for runs in times.values()) <= sum(sum(node.times_ms) for node in nodes) + 1e-9


def test_shared_nodes_count_in_parts_and_layout_changes_with_the_nearest_layer(bundle):
    marked = marked_float(bundle.path / "unet/model.onnx", INT8)
    numbers = {name: marked.layers.index(name) for name in LAYERS}
    nodes = (
        NodeTime(f"layer<{numbers['first']},{numbers['middle']}>.QuantizeLinear.x", "QuantizeLinear", (1.0, 3.0)),
        NodeTime("ReorderInput_token_3", "ReorderInput", (0.5, 0.5)),
        NodeTime(f"layer<{numbers['first']}>.first_nchwc", "Conv", (2.0, 2.0)),
        NodeTime("node_first_relu", "Relu", (9.0, 9.0)),
        NodeTime("node_shift", "Transpose", (9.0, 9.0)),
        NodeTime("Transpose_token_5", "Transpose", (0.25, 0.25)),
        NodeTime("out_sample_nchwc", "Conv", (4.0, 4.0)),
    )
    times = {name: runs.tolist() for name, runs in marked.times(nodes).items()}
    assert times == {"first": [3.0, 4.0], "middle": [0.5, 1.5], "last": [4.25, 4.25]}


class Sleeper:
    def __init__(self, calls):
        self.inputs, self.outputs, self.calls = {}, {}, calls

    def run(self):
        self.calls.append(self)


def test_graphs_take_turns_and_the_first_call_of_a_turn_is_not_timed():
    calls = []
    pair = Sleeper(calls), Sleeper(calls)
    assert time_in_turn(pair, 7, warmup=1).shape == (2, 7)
    turns = [0, 1] + [0] * 6 + [1] * 6 + [0] * 3 + [1] * 3
    assert [pair.index(call) for call in calls] == turns


def test_a_ratio_is_of_blocks():
    base = np.array([1.0, 1, 1, 9, 1, 2, 2, 2, 2, 9])
    found = ratio(base * 1.5, base)
    assert found.value == 1.5
    assert found.noise == 0


# --- the verb


def test_the_layer_with_an_outlier_is_found_and_stays_float(found):
    assert max(found.layers, key=lambda layer: layer.error).name == "middle"
    assert "middle" in found.kept
    measured = {point.label.split(",")[0]: point for point in found.shown()}
    assert measured["all quantized"].error == pytest.approx(measured["all quantized"].predicted_error, rel=0.5)
    (chosen,) = [point for point in found.points if "chosen" in point.label]
    assert chosen.error < 0.5 * measured["all quantized"].error


def test_quantize_keeps_what_the_report_keeps_and_says_why(tmp_path, bundle, state, found):
    found.save(tmp_path / "report.json")
    made = quantize(bundle, state, tmp_path / "int8", sensitivity=tmp_path / "report.json")
    layers = made.history[-1].arguments["layers"]["unet"]
    assert layers["float"] == dict(found.kept)
    assert layers["quantized"] == len(LAYERS) - len(found.kept)


def test_an_error_bound_is_held_by_what_is_measured(tmp_path, bundle, state, found):
    (everything,) = [p.error for p in found.points if p.label.startswith("all quantized")]
    bounded = sensitivity(bundle, state, tmp_path / "report.json", max_error=everything / 4, request=REQUEST)
    (chosen,) = [point for point in bounded.points if "chosen" in point.label]
    assert chosen.error <= everything / 4
    assert Sensitivity.load(tmp_path / "report.json") == bounded


def test_a_report_of_another_state_or_placement_is_refused(tmp_path, bundle, state, found):
    other = replace(state, calibration={**state.calibration, "seed": 1})
    with pytest.raises(ArgumentError, match="made for another quantization state"):
        quantize(bundle, other, tmp_path / "out", sensitivity=found)
    with pytest.raises(ArgumentError, match="made for another model"):
        quantize(bundle, state, tmp_path / "out", sensitivity=replace(found, weights="elsewhere"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_error": 0.1, "max_latency": 0.5}, "cannot both be bounds"),
        ({"max_error": 0.0}, "more than 0"),
        ({"max_error": float("nan")}, "more than 0"),
        ({"max_latency": 1.5}, "at most 1"),
        ({"max_error": 1e-12}, "No choice of layers holds the error of 1e-12. Got: .* with one layer quantized"),
        ({"max_latency": 1e-6}, "No choice of layers holds a step of 1e-06"),
        ({"target": "toaster"}, "cpu-x86-64"),
        ({"recipe": "w4a4"}, "made for the recipe 'int8'"),
        ({"request": replace(REQUEST, runs=0)}, "items and timed runs"),
        ({"request": replace(REQUEST, prompts=None)}, "--prompts FILE"),
        ({"request": replace(REQUEST, prompts=None), "source": "nowhere"}, "no prompts.txt in 'nowhere'"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_and_nothing_stays(tmp_path, bundle, state, settings, message):
    from edgediffusion.errors import EdgeDiffusionError

    with pytest.raises(EdgeDiffusionError, match=message):
        sensitivity(bundle, state, tmp_path / "report.json", **{"request": REQUEST, **settings})
    assert not list(tmp_path.iterdir())


def test_a_report_that_exists_is_refused_before_anything_is_measured(tmp_path, bundle, state):
    (tmp_path / "report.json").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        sensitivity(bundle, state, tmp_path / "report.json", request=REQUEST)


def test_a_recipe_that_quantizes_nothing_is_refused(tmp_path, bundle, state):
    nothing = replace(state, recipe=replace(INT8, exclude=(".",)).to_json())
    with pytest.raises(ArgumentError, match="quantizes no layer"):
        sensitivity(bundle, nothing, tmp_path / "report.json", request=REQUEST)


def test_a_state_of_several_stages_is_refused(tmp_path, bundle, state):
    with pytest.raises(ArgumentError, match="measures one. Got: 2 stages"):
        sensitivity(bundle, replace(state, below=(500.0,)), tmp_path / "report.json", request=REQUEST)


# --- numbers that are not finite


def test_a_layer_that_gives_no_numbers_is_named_and_nothing_is_written(tmp_path, bundle, state):
    broken = replace(state.layers["unet/words"], weight_amax=np.full(8, np.inf, np.float32))
    bad = replace(state, layers={**state.layers, "unet/words": broken})
    with pytest.raises(BundleError, match="The layer 'words' gives numbers that are not finite"):
        quantize(bundle, bad, tmp_path / "out")
    with pytest.raises(BundleError, match="The layer 'words' gives numbers that are not finite"):
        sensitivity(bundle, bad, tmp_path / "report.json", request=REQUEST)
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_finite_pass(bundle):
    component = bundle.component("unet")
    file = bundle.path / component.model
    check_finite(onnxruntime, component, file, file, [noise_feeds(bundle, component)])


def test_noise_is_made_only_for_sizes_that_are_known(bundle):
    component = bundle.component("unet")
    feeds = noise_feeds(bundle, component)
    assert {name: array.shape for name, array in feeds.items()} == {
        "sample": (2, 4, 2, 2),  # the smallest that it can draw
        "timestep": (),
        "encoder_hidden_states": (2, TOKENS, WIDTH),
    }
    assert feeds["timestep"] == 500
    assert noise_feeds(replace(bundle, sampling=None), component) is None
    odd = Component("unet", "denoise", "m", (TensorSpec("x", "float32", ("frames",)),), ())
    assert noise_feeds(bundle, odd) is None
