"""TIAR: the time embedding's rounding, fitted to what it gives at the sampler's steps."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from edgediffusion.errors import ArgumentError
from edgediffusion.optimize import temporal
from edgediffusion.optimize.measure import measure
from edgediffusion.optimize.observe import tensors
from edgediffusion.optimize.recipe import Recipe
from edgediffusion.optimize.rounding import Job
from edgediffusion.optimize.simulate import NearestLayer, simulated
from edgediffusion.optimize.temporal import tiar

RECIPE = Recipe("r", "int4", "int8", balance="none", ranges="mse", temporal="tiar", exclude=("^conv$",))


class Embedding(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear_1, self.linear_2 = torch.nn.Linear(16, 32), torch.nn.Linear(32, 32)

    def forward(self, sample, condition=None):
        return self.linear_2(torch.nn.functional.silu(self.linear_1(sample)))


class Resnet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.nonlinearity, self.time_emb_proj = torch.nn.SiLU(), torch.nn.Linear(32, 8)

    def forward(self, x, temb):
        return x + self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]


class Network(torch.nn.Module):
    def __init__(self, other=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.other = other
        self.time_embedding, self.conv = Embedding(), torch.nn.Conv2d(4, 8, 1)
        self.resnets = torch.nn.ModuleList([Resnet(), Resnet()])

    def forward(self, sample, timestep):
        angles = timestep.expand(len(sample))[:, None] * 0.5 ** torch.arange(8)
        temb = self.time_embedding(torch.cat([angles.sin(), angles.cos()], 1), None) + self.other * sample.mean()
        x = self.conv(sample)
        for resnet in self.resnets:
            x = resnet(x, temb)
        return x


@pytest.fixture
def items():
    rng = np.random.default_rng(0)
    return [
        (i % 5, {"sample": rng.standard_normal((2, 4, 3, 3), np.float32), "timestep": np.float32([100 - i % 5 * 20])}) for i in range(15)
    ]


def embeddings(network, items):
    """What the projections give at every item."""
    given = []
    handles = [r.time_emb_proj.register_forward_hook(lambda _m, _x, y: given.append(y[:1].detach())) for r in network.resnets]
    with torch.no_grad():
        for _, feed in items:
            network(**tensors(feed))
    for handle in handles:
        handle.remove()
    return torch.cat(given)


class Coded(NearestLayer):
    """As the state says: with codes where it has them."""

    def __init__(self, layer, state, bits):
        super().__init__(layer, state, bits)
        self.given = None if state.codes is None else torch.from_numpy(state.codes).float()

    def read_weight(self):
        return super().read_weight() if self.given is None else self.given * self.weight_step


def lost(network, states, items):
    exact, names = embeddings(network, items), [name for name in states if name != "conv"]
    modules = [r.time_emb_proj for r in network.resnets]
    given = []
    with simulated(network, states, dict.fromkeys(names, (4, 8)), lambda bits: Coded):
        handles = [r.time_emb_proj.register_forward_hook(lambda _m, _x, y: given.append(y[:1].detach())) for r in network.resnets]
        with torch.no_grad():
            for _, feed in items:
                network(**tensors(feed))
        for handle in handles:
            handle.remove()
    assert [r.time_emb_proj for r in network.resnets] == modules
    return float((torch.cat(given) - exact).square().sum())


def job_of(network, items, recipe=RECIPE):
    states = measure(network, items, replace(recipe, temporal=""))
    return Job(network, [feed for _, feed in items], states, recipe, 0, lambda part: None)


def test_the_embedding_is_nearer_than_rounded_to_nearest(items, monkeypatch):
    monkeypatch.setattr(temporal, "ITERATIONS", 1500)
    job = job_of(Network(), items)
    found = tiar(job)
    assert set(found) == {"time_embedding.linear_1", "time_embedding.linear_2", "resnets.0.time_emb_proj", "resnets.1.time_emb_proj"}
    assert lost(job.module, {**job.layers, **found}, items) < 0.5 * lost(job.module, job.layers, items)


def test_every_code_is_the_one_below_or_above_and_the_same_every_time(items, monkeypatch):
    monkeypatch.setattr(temporal, "ITERATIONS", 500)
    first, again = (tiar(job_of(Network(), items)) for _ in range(2))
    weight = Network().time_embedding.linear_2.weight.detach().numpy()
    state = first["time_embedding.linear_2"]
    steps = np.clip(weight / (state.weight_amax / 7)[:, None], -7, 7)
    assert (np.abs(state.codes - steps) < 1 + 1e-4).all()
    for name, layer in first.items():
        np.testing.assert_array_equal(layer.codes, again[name].codes)


def test_a_recipe_asks_for_it(items, monkeypatch):
    monkeypatch.setattr(temporal, "ITERATIONS", 500)
    states = measure(Network(), items, RECIPE)
    assert states["time_embedding.linear_1"].codes is not None
    assert states["conv"].codes is None


def test_what_is_no_better_than_nearest_is_left_at_nearest(items, monkeypatch):
    monkeypatch.setattr(temporal, "ITERATIONS", 0)  # then every weight is where the soft one began: at its nearest code
    assert tiar(job_of(Network(), items)) == {}


def test_layers_that_stay_float_leave_nothing_to_fit(items):
    with pytest.raises(ArgumentError, match="keeps all of its layers float"):
        tiar(job_of(Network(), items, replace(RECIPE, exclude=("time_", "conv"))))


def test_a_network_without_the_block_is_refused(items):
    network = torch.nn.Conv2d(4, 8, 1)
    network.forward = lambda sample, timestep, plain=network.forward: plain(sample)
    with pytest.raises(ArgumentError, match="the network has none"):
        tiar(Job(network, [feed for _, feed in items], {}, RECIPE, 0, lambda part: None))


def test_another_condition_in_the_embedding_is_refused(items):
    with pytest.raises(ArgumentError, match="not all that the residual blocks read"):
        tiar(job_of(Network(other=1.0), items))
