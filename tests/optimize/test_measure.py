"""From a network to the state of its layers, and the torch side of quantized layers: it must be what the graph computes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from edgediffusion import registry
from edgediffusion.errors import ArgumentError
from edgediffusion.optimize.integers import spread, weight_codes, weight_scale
from edgediffusion.optimize.measure import measure
from edgediffusion.optimize.observe import observe
from edgediffusion.optimize.recipe import Recipe
from edgediffusion.optimize.rounding import Job
from edgediffusion.optimize.rounding.gptq import gptq
from edgediffusion.optimize.simulate import AdaRoundLayer, NearestLayer, anneal, initial_rounding, simulated


class Network(torch.nn.Module):
    """A convolution, two linear layers that read one tensor, and one that nothing reaches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(4, 8, 3, padding=1)
        self.a, self.b, self.unused = (torch.nn.Linear(8, 6) for _ in range(3))
        with torch.no_grad():
            self.conv.weight[2] *= 20  # one wide channel, as trained networks have

    def forward(self, sample, timestep):
        x = torch.nn.functional.silu(self.conv(sample)).flatten(2).transpose(1, 2) + timestep.view(-1, 1, 1)
        return self.a(x) + self.b(x)


@pytest.fixture
def items():
    rng = np.random.default_rng(0)
    return [(i % 4, {"sample": rng.standard_normal((2, 4, 5, 5), np.float32), "timestep": np.float32([i % 4])}) for i in range(12)]


INT8 = Recipe("int8", "int8", "int8")
W4A4 = Recipe("w4a4", "int4", "int4", ranges="mse")


def error(states, items, bits):
    """Relative squared error of the network's result with simulated layers."""
    network = Network()
    feeds = [{name: torch.from_numpy(array) for name, array in feed.items()} for _, feed in items]
    with torch.no_grad():
        expected = torch.cat([network(**feed) for feed in feeds])
        with simulated(network, states, bits):
            found = torch.cat([network(**feed) for feed in feeds])
    return float((found - expected).square().sum() / expected.square().sum())


def test_what_is_observed(items):
    network = Network()
    seen = observe(network, items)
    assert set(seen) == {"conv", "a", "b"}
    samples = np.stack([feed["sample"] for _, feed in items]).transpose(2, 0, 1, 3, 4).reshape(4, -1)
    np.testing.assert_array_equal(seen["conv"].input.low, samples.min(1))
    np.testing.assert_array_equal(seen["conv"].input.high, samples.max(1))
    np.testing.assert_allclose(seen["conv"].input.mean_square, (samples.astype(np.float64) ** 2).mean(1))
    assert set(seen["conv"].steps) == {0, 1, 2, 3}
    np.testing.assert_array_equal(np.stack(list(seen["conv"].steps.values())).max(0), np.abs(samples).max(1))
    assert seen["a"].readers == ("a", "b")
    assert seen["conv"].readers == ("conv",)


def test_values_that_are_no_numbers_name_layer_and_step(items):
    items[5][1]["sample"][0, 0, 0, 0] = np.nan
    with pytest.raises(ArgumentError, match=r"'conv' .* step 1"):
        observe(Network(), items)


@pytest.mark.parametrize("name", registry.names("optimize.balance"))
def test_layers_that_read_one_tensor_share_their_factors(items, name):
    states = measure(Network(), items, replace(INT8, balance=name))
    np.testing.assert_array_equal(states["a"].factors, states["b"].factors)


def test_an_excluded_layer_is_not_balanced(items):
    states = measure(Network(), items, replace(INT8, exclude=("^b$",), balance="smoothquant"))
    assert (states["b"].factors == 1).all()
    assert (states["a"].factors != 1).any()


def test_a_layer_gets_the_bits_of_its_own(items):
    recipe = replace(W4A4, eight=("^conv$",))
    states = measure(Network(), items, recipe)
    assert states["conv"].input_clip == 1.0
    assert recipe.bits("conv") == (8, 8)


def test_the_search_helps(items):
    bits = dict.fromkeys(("conv", "a", "b"), (4, 4))
    found = {b: error(measure(Network(), items, replace(W4A4, balance=b, ranges="max")), items, bits) for b in ("none", "search")}
    assert found["search"] < 0.7 * found["none"]
    assert error(measure(Network(), items, W4A4), items, bits) <= found["search"]


def test_the_mean_over_steps_is_of_the_balanced_input(items):
    states = measure(Network(), items, replace(INT8, ranges="step-mean"))
    largest = {}
    for step, feed in items:
        x = np.abs(feed["sample"] / states["conv"].factors[:, None, None]).max()
        largest[step] = max(x, largest.get(step, 0))
    assert states["conv"].input_clip == pytest.approx(np.mean(list(largest.values())) / max(largest.values()))


def test_modelopt_finds_what_was_observed_and_clips_weights(items):
    """Its maxima are those of the balanced layers; with squared error as the measure it cuts some weights of 4 bits."""
    ours = measure(Network(), items, INT8)
    theirs = measure(Network(), items, replace(INT8, ranges="modelopt-max"))
    for name in ("conv", "a", "b"):
        np.testing.assert_allclose(theirs[name].weight_amax, ours[name].weight_amax, rtol=1e-5)
        np.testing.assert_allclose(theirs[name].input_range(), ours[name].input_range(), rtol=1e-5)
    cut = measure(Network(), items, replace(INT8, weights="int4", ranges="modelopt-mse"))
    whole = measure(Network(), items, replace(INT8, weights="int4"))
    assert any((cut[name].weight_amax < whole[name].weight_amax * 0.99).any() for name in ("conv", "a", "b"))


@pytest.mark.parametrize("method", ["nearest", "gptq", "straight-through"])
def test_scales_by_group_of_input_channels(method):
    """Half of the inputs have weights a hundred times smaller: with scales of their own they keep their bits."""

    class Halves(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = torch.nn.Linear(32, 8)
            with torch.no_grad():
                self.linear.weight[:, 16:] *= 0.01

        def forward(self, sample):
            return self.linear(sample)

    rng = np.random.default_rng(0)
    scale = np.where(np.arange(32) < 16, 1, 100).astype(np.float32)
    items = [(i, {"sample": rng.standard_normal((2, 7, 32), np.float32) * scale}) for i in range(12)]
    lost = {}
    for group in (0, 16):
        recipe = Recipe("r", "int4", "float", balance="none", ranges="mse", rounding=method, group=group)
        state = measure(Halves(), items, recipe)["linear"]
        assert state.weight_amax.shape == ((8, 2) if group else (8,))
        weight = Halves().linear.weight.detach().numpy()
        step = weight_scale(state.weight_amax, 4)
        codes = weight_codes(weight, step, 4) if state.codes is None else state.codes
        lost[group] = np.mean([(sample["sample"] @ (weight - codes * spread(step, weight.shape)).T) ** 2 for _, sample in items])
    assert lost[16] < 0.2 * lost[0]


def test_initial_rounding_golden():
    values = initial_rounding(torch.tensor([0.25, 0.5, 0.75]))  # METHODS 2.4
    np.testing.assert_allclose(values.numpy(), [-0.887303, 0, 0.887303], atol=1e-6)


def test_anneal_golden():
    found = [anneal(i / 20000) for i in (4000, 8000, 12000, 16000, 20000)]  # METHODS 2.4
    np.testing.assert_allclose(found, [20, 15.5, 11, 6.5, 2])


def test_a_soft_layer_starts_as_the_float_one_and_a_hard_one_rounds_to_nearest(items):
    network = Network()
    state = measure(network, items, W4A4)["conv"]
    state = replace(state, weight_amax=np.abs(network.conv.weight.detach().numpy() * state.factors[:, None, None]).reshape(8, -1).max(1))
    layer = AdaRoundLayer(network.conv, state, (4, 16))
    x = torch.from_numpy(items[0][1]["sample"])
    torch.testing.assert_close(layer(x), network.conv(x), rtol=1e-3, atol=1e-3)
    weight = network.conv.weight.detach().numpy() * state.factors[:, None, None]
    nearest = weight_codes(weight, weight_scale(state.weight_amax, 4), 4)
    assert (layer.codes() != nearest).mean() < 0.01  # halves go up, not to even


@pytest.mark.parametrize("method", [m for m in registry.names("optimize.rounding") if m != "nearest"])
def test_learned_rounding_is_better_than_nearest_and_the_same_every_time(items, method):
    """Weights only: four bits of the activations would drown what rounding gains here."""
    recipe, bits = replace(W4A4, activations="float"), dict.fromkeys(("conv", "a", "b"), (4, 16))
    nearest, rounding = measure(Network(), items, recipe), registry.find("optimize.rounding", method)
    learned = []
    for _ in range(2):
        network = Network()
        job = Job(network, [feed for _, feed in items], nearest, recipe, 0, lambda part: None)
        learned.append(rounding.round_weights(job))
        assert isinstance(network.conv, torch.nn.Conv2d), "the network is as it was"
    assert learned_error(learned[0], items) < 0.95 * error(nearest, items, bits)
    for name, state in learned[0].items():
        assert np.abs(state.codes).max() <= 7
        np.testing.assert_array_equal(state.codes, learned[1][name].codes)


def test_gptq_with_uncorrelated_inputs_is_rounding_to_nearest():
    weight, step = torch.randn(3, 10, dtype=torch.float64), torch.full((3, 10), 0.3, dtype=torch.float64)
    codes, bias = gptq(weight.clone(), [torch.eye(6, dtype=torch.float64) * 5, torch.eye(4, dtype=torch.float64)], step, 7)
    assert bias is None
    torch.testing.assert_close(codes, torch.clamp(torch.round(weight / step), -7, 7))


def test_gptq_in_batches_of_columns_is_gptq_column_by_column():
    """Its definition, the loop over columns with the inverse of what is left of H (2210.17323, equations 2 and 3)."""
    torch.manual_seed(0)
    x = torch.randn(40, 300, dtype=torch.float64) @ torch.randn(300, 300, dtype=torch.float64).mul(0.05).matrix_exp()
    h, weight, step = x.T @ x, torch.randn(5, 300, dtype=torch.float64), torch.full((5, 300), 0.4, dtype=torch.float64)
    expected, left = torch.empty_like(weight), weight.clone()
    inverse = torch.linalg.inv(h + torch.eye(300, dtype=torch.float64) * 0.01 * h.diagonal().mean())
    for i in range(300):
        expected[:, i] = torch.clamp(torch.round(left[:, i] / step[:, i]), -7, 7)
        error = (left[:, i] - expected[:, i] * step[:, i]) / inverse[0, 0]
        left[:, i:] -= torch.outer(error, inverse[0])
        inverse = inverse[1:, 1:] - torch.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    torch.testing.assert_close(gptq(weight, [h], step, 7)[0], expected)


def test_gptq_leaves_no_mean_error_to_a_bias():
    """Of an input far from zero, rounding shifts the output; the bias takes the shift back."""
    torch.manual_seed(0)
    x = torch.cat([torch.rand(200, 20, dtype=torch.float64) + 3, torch.ones(200, 1, dtype=torch.float64)], 1)
    weight, bias, step = torch.randn(4, 20, dtype=torch.float64), torch.zeros(4, dtype=torch.float64), torch.full((4, 20), 0.4).double()
    codes, moved = gptq(weight, [x.T @ x], step, 7, bias)
    lost = (x[:, :20] @ weight.T) - (x[:, :20] @ (codes * step).T + moved)
    shift = (x[:, :20] @ (weight - torch.clamp(torch.round(weight / step), -7, 7) * step).T).mean(0)
    assert lost.mean(0).abs().max() < 0.05 * shift.abs().max()


def learned_error(states, items):
    """As ``error``, with the codes and biases that were learned."""

    class Coded(NearestLayer):
        def read_weight(self):
            return self.codes_given * self.weight_step

    network = Network()
    feeds = [{name: torch.from_numpy(array) for name, array in feed.items()} for _, feed in items]
    with torch.no_grad():
        expected = torch.cat([network(**feed) for feed in feeds])
        with simulated(network, states, dict.fromkeys(states, (4, 16)), lambda bits: Coded) as layers:
            for name, layer in layers.items():
                layer.codes_given = torch.from_numpy(states[name].codes).float()
                if states[name].bias is not None:
                    layer.bias.copy_(torch.from_numpy(states[name].bias))
            found = torch.cat([network(**feed) for feed in feeds])
    return float((found - expected).square().sum() / expected.square().sum())
