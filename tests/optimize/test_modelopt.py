"""ModelOpt's algorithms: their numbers reach the state, and they are the numbers that its own modules hold."""

import contextlib
import copy
import io
from dataclasses import replace

import numpy as np
import pytest
import torch

from edgediffusion import registry
from edgediffusion.errors import ArgumentError, MissingExtra
from edgediffusion.export.named import Named
from edgediffusion.optimize import modelopt
from edgediffusion.optimize.measure import check_graph_recipe, measure
from edgediffusion.optimize.modelopt_formats import choose_formats
from edgediffusion.optimize.observe import observe, tensors
from edgediffusion.optimize.recipe import Recipe, load_recipe
from edgediffusion.optimize.simulate import simulated

METHODS = [name for name in registry.names("optimize.balance") if name.startswith("modelopt")]
W4 = Recipe("w4", "int4", "int8", balance="modelopt-awq")


class Network(torch.nn.Module):
    """A convolution, two linear layers that read one tensor, one behind them, and one that nothing reaches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(4, 16, 3, padding=1)
        self.a, self.b, self.last, self.unused = (torch.nn.Linear(16, 16) for _ in range(4))
        with torch.no_grad():
            self.a.weight[:, 3] *= 0.05
            self.conv.weight[3] *= 20  # a wide channel that small weights read, as trained networks have

    def forward(self, sample):
        x = torch.nn.functional.silu(self.conv(sample)).flatten(2).transpose(1, 2)
        return self.last(torch.tanh(self.a(x) + self.b(x)))


@pytest.fixture
def items():
    rng = np.random.default_rng(0)
    return [(i % 4, {"sample": rng.standard_normal((2, 4, 5, 5), np.float32)}) for i in range(12)]


def quantized(items, algorithm, bits=(8, 8)):
    """Its own modules, as a user of ModelOpt gets them."""
    mtq = modelopt.library()
    network = Network()
    config = [{"quantizer_name": "*", "enable": False}]
    for name in ("a", "b", "last"):
        config.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": {"num_bits": bits[0], "axis": 0}})
        config.append({"quantizer_name": f"{name}.input_quantizer", "cfg": {"num_bits": bits[1], "axis": None}})

    def run(model):
        for _, feed in items:
            model(**tensors(feed))

    with contextlib.redirect_stdout(io.StringIO()):
        mtq.quantize(network, {"quant_cfg": config, "algorithm": algorithm}, run)
    return network


def test_smoothquant_gives_ours_to_a_constant(items):
    """One formula: max|x|^0.8 / max|w|^0.2. For two layers of one tensor ModelOpt averages, ours takes their largest weights."""
    state = measure(Network(), items, Recipe("s", "int8", "int8", balance="modelopt-smoothquant"))
    ours = measure(Network(), items, Recipe("s", "int8", "int8", balance="smoothquant"))
    ratio = state["last"].factors / ours["last"].factors
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
    assert (state["conv"].factors == 1).all()


def test_factors_are_the_inverse_of_its_scales_and_their_mean_where_a_tensor_is_shared(items):
    theirs = quantized(items, {"method": "awq_lite", "alpha_step": 0.1}, (4, 8))
    state = measure(Network(), items, W4)
    scale = {name: theirs.get_submodule(name).input_quantizer.pre_quant_scale.numpy() for name in ("a", "b", "last")}
    np.testing.assert_allclose(state["last"].factors, 1 / scale["last"], rtol=1e-5)
    np.testing.assert_allclose(state["a"].factors, 1 / ((scale["a"] + scale["b"]) / 2), rtol=1e-5)
    np.testing.assert_array_equal(state["a"].factors, state["b"].factors)
    assert (state["last"].factors != 1).any()


def test_the_branch_is_that_of_its_svdquant(items):
    theirs = quantized(items, {"method": "svdquant", "lowrank": 3}, (4, 8)).last.weight_quantizer
    state = measure(Network(), items, replace(W4, balance="modelopt-svdquant", rank=3))
    assert state["last"].up.shape == (16, 3)
    product = (theirs.svdquant_lora_b @ theirs.svdquant_lora_a).numpy()
    np.testing.assert_allclose(state["last"].up @ state["last"].down, product, atol=1e-5)
    weight = Network().last.weight.detach().numpy() * state["last"].factors
    values = np.linalg.svd(weight, compute_uv=False)
    rest = np.square(state["last"].without_branch(weight)).sum()
    assert rest == pytest.approx(np.square(values[3:]).sum(), rel=1e-4)  # METHODS 7.6
    assert state["conv"].up is None


@pytest.mark.parametrize("name", METHODS)
def test_what_a_state_of_its_factors_computes(items, name):
    """(x / f) (f w) is x w: quantized to 8 bits, the network is nearly the float one, and the module is as it was."""
    network = Network()
    before = copy.deepcopy(network.state_dict())
    states = measure(network, items, Recipe("r", "int8", "int8", balance=name, rank=3))
    for key, value in network.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    assert type(network.a) is torch.nn.Linear
    feed = tensors(items[0][1])
    with torch.no_grad():
        expected = network(**feed)
        with simulated(network, states, dict.fromkeys(states, (8, 8))):
            found = network(**feed)
    assert (found - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("changes", [*({"balance": name} for name in METHODS), {"ranges": "modelopt-max"}], ids=str)
def test_a_network_that_export_wraps_gives_the_same(items, changes):
    """ModelOpt gets a copy of it, whose layers must be those that its call reaches."""
    wrapped = Named(Network(), ["sample"], lambda network, feeds: network(feeds["sample"]))
    recipe = Recipe("r", "int8", "int8", rank=3, **changes)
    found, expected = measure(wrapped, items, recipe, prefix="network."), measure(Network(), items, recipe)
    assert found.keys() == expected.keys()
    for name, layer in found.items():
        np.testing.assert_array_equal(layer.factors, expected[name].factors)
        np.testing.assert_array_equal(layer.weight_amax, expected[name].weight_amax)
        assert layer.input_clip == expected[name].input_clip


def test_awq_of_weights_alone_sees_the_groups_that_have_scales(items):
    """With a scale for every 16 inputs, which here are all, the search is that of a whole row."""
    recipe = replace(W4, activations="float")
    whole, grouped = measure(Network(), items, recipe), measure(Network(), items, replace(recipe, group=16))
    np.testing.assert_allclose(grouped["last"].factors, whole["last"].factors, rtol=1e-5)
    assert grouped["last"].weight_amax.shape == (16, 1) or grouped["last"].weight_amax.shape == (16,)


def test_the_choice_of_formats_is_the_one_with_the_least_error(items):
    """1600 weights, of which 832 stay float: at 10.9 bits one of the other layers can have 8 bits in the place of 4."""
    feeds, asked = [feed for _, feed in items], Recipe("r", "int4", "int8", balance="none", exclude=("conv",), effective_bits=10.9)
    recipe = choose_formats(Network(), feeds, asked)
    states, network, lost = measure(Network(), items, asked), Network(), {}
    for chosen in ("a", "b", "last"):
        bits = {name: (8 if name == chosen else 4, 8) for name in ("a", "b", "last")}
        with torch.no_grad():
            expected = [network(**tensors(feed)) for feed in feeds]
            states[chosen] = measure(Network(), items, replace(asked, eight=(f"^{chosen}$",)))[chosen]
            with simulated(network, states, bits):
                lost[chosen] = sum(float((network(**tensors(f)) - y).square().sum()) for f, y in zip(feeds, expected, strict=True))
    assert recipe.eight == (f"^{min(lost, key=lost.__getitem__)}$",)
    assert recipe.exclude == ("conv",)
    assert choose_formats(Network(), feeds, asked) == recipe


def test_layers_that_have_eight_bits_keep_them_and_int8_has_float_beside_it(items):
    feeds = [feed for _, feed in items]
    recipe = choose_formats(Network(), feeds, Recipe("r", "int4", "int8", eight=("^b$",), effective_bits=8))
    assert recipe.bits("b")[0] == 8
    assert recipe.excludes("b") is None
    whole = choose_formats(Network(), feeds, Recipe("r", "int8", "int8", effective_bits=11))
    assert whole.eight == ()
    assert whole.exclude
    assert all(e.startswith("^") for e in whole.exclude)


def test_bits_that_the_float_layers_use_up_are_refused(items):
    with pytest.raises(ArgumentError, match=r"fewer bits .* Got: effective_bits = 4"):
        choose_formats(Network(), [items[0][1]], Recipe("r", "int4", "int8", exclude=("conv",), effective_bits=4))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('balance = "modelopt-smoothquant"', "int8 alone"),
        ('balance = "modelopt-svdquant"', "branch of low rank"),
        ('balance = "modelopt-awq"\nactivations = "fp8"', "of integers"),
        ("effective_bits = 3", "mean of bits"),
        ("effective_bits = true", "mean of bits"),
        ('reconstruct = "block"', "a way to learn"),
        ('reconstruct = "layer"', "network, block"),
        ('temporal = "fsc"', "tiar"),
    ],
)
def test_recipes_that_ask_for_what_cannot_be(tmp_path, text, reason):
    file = tmp_path / "own.toml"
    plain = {"weights": "int4", "activations": "int8"}
    lines = [f'{key} = "{value}"' for key, value in plain.items() if f"{key} =" not in text]
    file.write_text("\n".join([*lines, text]))
    with pytest.raises(ArgumentError, match=reason):
        load_recipe(str(file))


@pytest.mark.parametrize("change", [{"balance": "modelopt-awq"}, {"effective_bits": 6.0}, {"temporal": "tiar"}])
def test_without_a_source_they_are_refused(change):
    with pytest.raises(ArgumentError, match="--source"):
        check_graph_recipe(Recipe("r", "int8", "int8", **change))


def test_without_the_extra_the_message_names_it(monkeypatch, items):
    def missing(module, *, extra, purpose):
        raise MissingExtra(module, extra, purpose)

    monkeypatch.setattr(modelopt, "require", missing)
    with pytest.raises(MissingExtra, match="optimize"):
        measure(Network(), items, W4)
    with pytest.raises(MissingExtra, match="optimize"):
        choose_formats(Network(), [items[0][1]], replace(W4, effective_bits=8))


def test_it_is_quiet(capfd, items):
    measure(Network(), items, W4)
    choose_formats(Network(), [feed for _, feed in items], replace(W4, effective_bits=8))
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err == ""


def test_what_is_not_observed_is_not_balanced(items):
    assert "unused" not in observe(Network(), items)
