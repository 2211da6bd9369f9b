"""Learning block after block: which units there are, what they are fed, and that it helps."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from edgediffusion.optimize.measure import measure
from edgediffusion.optimize.observe import tensors
from edgediffusion.optimize.recipe import Recipe
from edgediffusion.optimize.rounding import Job, _blocks, adaround, straight_through
from edgediffusion.optimize.rounding._fit import Settings
from edgediffusion.optimize.simulate import simulated

BITS = ("int4", "int8")
FEW = Settings(iterations=60, batch=4)


class Resnet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = (torch.nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))

    def forward(self, x, temb, *, scale=1.0):
        return x + scale * self.conv2(torch.tanh(self.conv1(x) + temb[:, None, None, None]))


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_out = (torch.nn.Linear(8, 8) for _ in range(2))

    def forward(self, hidden_states, context=None):
        return self.to_out(torch.tanh(self.to_q(hidden_states))), context


class Network(torch.nn.Module):
    """The names of a UNet of diffusers; the blocks are made in another order than they are called in, and one is not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv_out = torch.nn.Conv2d(8, 4, 1)
        self.transformer_blocks = torch.nn.ModuleList([Block(), Block()])
        self.resnets = torch.nn.ModuleList([Resnet()])
        self.conv_in = torch.nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, sample, timestep):
        x = self.resnets[0](self.conv_in(sample), timestep.expand(len(sample)), scale=0.5)
        tokens, _ = self.transformer_blocks[0](x.flatten(2).transpose(1, 2), context=None)
        return self.conv_out(tokens.transpose(1, 2).reshape(x.shape))


@pytest.fixture
def items():
    rng = np.random.default_rng(0)
    return [(i % 4, {"sample": rng.standard_normal((2, 4, 5, 5), np.float32), "timestep": np.float32([i % 4])}) for i in range(12)]


def job_of(items, **changes):
    recipe = Recipe("r", *BITS, ranges="mse", reconstruct="block")
    layers = measure(Network(), items, replace(recipe, reconstruct="network"))
    return replace(Job(Network(), [feed for _, feed in items], layers, recipe, 0, lambda part: None), **changes)


def error(job, states, kind):
    wanted = {name: job.bits(name) for name in job.layers}
    lost, whole = 0.0, 0.0
    for feed in map(tensors, job.items):
        with torch.no_grad():
            expected = job.module(**feed)
            with simulated(job.module, states, wanted, lambda bits: kind):
                lost += float((job.module(**feed) - expected).square().sum())
            whole += float(expected.square().sum())
    return lost / whole


def test_units_stand_in_the_order_of_calls(items):
    job = job_of(items)
    assert _blocks.units_of(job, {name: (4, 8) for name in job.layers}) == {
        "conv_in": ["conv_in"],
        "resnets.0": ["resnets.0.conv1", "resnets.0.conv2"],
        "transformer_blocks.0": ["transformer_blocks.0.to_q", "transformer_blocks.0.to_out"],
        "conv_out": ["conv_out"],
    }


@pytest.mark.parametrize(
    ("path", "unit"),
    [
        ("up_blocks.1.resnets.0.conv_shortcut.1", "up_blocks.1.resnets.0"),
        ("network.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj", "network.mid_block.attentions.0.transformer_blocks.0"),
        ("single_transformer_blocks.12.attn.to_q", "single_transformer_blocks.12"),
        ("down_blocks.0.downsamplers.0.conv", None),
        ("mid_block.attentions.0.proj_in", None),
    ],
)
def test_blocks_by_the_names_of_diffusers(path, unit):
    found = _blocks.BLOCK.match(path)
    assert (found and found[1]) == unit


@pytest.mark.parametrize("method", [adaround, straight_through])
def test_it_is_better_than_nearest_and_the_same_every_time(items, method):
    job = job_of(items)
    states = method.round_weights(job, replace(method.SETTINGS, iterations=150, batch=4))
    assert set(states) == set(job.layers)
    assert isinstance(job.module.conv_in, torch.nn.Conv2d), "the network is as it was"
    nearest = error(job, job.layers, _blocks.NearestLayer)
    assert error(job, {**job.layers, **states}, _blocks.LearnedLayer) < 0.9 * nearest
    again = method.round_weights(job_of(items), replace(method.SETTINGS, iterations=150, batch=4))
    for name, state in states.items():
        np.testing.assert_array_equal(state.codes, again[name].codes)


def test_a_unit_reads_what_the_quantized_ones_before_it_give(items, monkeypatch):
    """The second unit's inputs differ from the float ones; the first one's do not."""
    seen = {}
    real = _blocks._fit_unit

    def watch(job, method, path, bits, exact, given, *parts):
        seen[path] = [float((q - x).abs().max()) for q, x in zip(given.inputs, exact.inputs, strict=True) if given.varies(q)]
        return real(job, method, path, bits, exact, given, *parts)

    monkeypatch.setattr(_blocks, "_fit_unit", watch)
    straight_through.round_weights(job_of(items), FEW)
    assert seen["conv_in"] == [0.0]
    assert seen["resnets.0"][0] > 0  # what the first convolution gives
    assert seen["resnets.0"][1] == 0  # the time step


def test_items_beyond_the_budget_are_left_out(items, monkeypatch):
    monkeypatch.setattr(_blocks, "BUDGET", 40_000)
    job = job_of(items)
    chosen = _blocks._that_fit(job, ["conv_in", "resnets.0"])
    assert 1 <= len(chosen) < len(items)
    assert chosen[0] == 0
    assert set(straight_through.round_weights(job, FEW)) == set(job.layers)


def test_progress_ends_at_one(items):
    told = []
    straight_through.round_weights(job_of(items, progress=told.append), FEW)
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1)
