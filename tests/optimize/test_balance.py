"""Balancing methods: goldens of the papers' formulas, and what every method of the folder must hold."""

import numpy as np
import pytest
import torch

from edgediffusion import registry
from edgediffusion.optimize.balance import balanced
from edgediffusion.optimize.balance.csb import salience, spearman
from edgediffusion.optimize.balance.search import expected_error
from edgediffusion.optimize.observe import observe
from edgediffusion.optimize.observed import Channels, Observed


@pytest.fixture(scope="module")
def layer():
    """A linear layer whose input has one wide channel and one that is always zero."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 5))
    rng = np.random.default_rng(1)
    items = [(step, {"input": (rng.standard_normal((2, 7, 6)) * [1, 40, 1, 1, 0, 1] * (step + 1)).astype(np.float32)}) for step in range(4)]
    return observe(module, items)["0"]


def test_smoothquant_golden():
    np.testing.assert_allclose(balanced(np.array([10.0, 1]), np.array([0.1, 1]), 0.8) * np.sqrt(10), [10, 1], rtol=1e-6)  # METHODS 2.6


def test_csb_golden():
    factors = balanced(np.array([10.0, 1]), np.array([0.1, 1]), 0.5) * np.sqrt(10)
    np.testing.assert_allclose(factors, [10, 1], rtol=1e-6)  # METHODS 7.1; both sides then are sqrt(s_x s_w) = 1


def test_spearman():
    assert spearman(np.array([1.0, 2, 3]), np.array([10.0, 20, 30])) == pytest.approx(1)
    assert spearman(np.array([1.0, 2, 3]), np.array([9.0, 4, 1])) == pytest.approx(-1)
    assert spearman(np.array([1.0, 1, 1]), np.array([9.0, 4, 1])) == 0
    assert spearman(np.array([1.0, 2, 2, 3]), np.array([1.0, 2, 3, 4])) == pytest.approx(np.sqrt(0.9))  # ties share their mean rank


def test_steps_that_agree_with_the_weight_count_less():
    w = np.array([1.0, 2, 3])
    steps = np.stack([np.array([1.0, 2, 3]), np.array([3.0, 2, 1])])
    weights = np.exp([-1, 1]) / np.exp([-1, 1]).sum()
    np.testing.assert_allclose(salience(steps, w), weights @ steps)


STATISTICAL = [name for name in registry.names("optimize.balance") if not name.startswith("modelopt")]  # the others: test_modelopt.py


@pytest.mark.parametrize("name", STATISTICAL)
def test_every_method_gives_a_positive_factor_for_each_channel(layer, name):
    factors = registry.find("optimize.balance", name).factors([layer, layer], (4, 8))
    assert factors.shape == (6,)
    assert factors.dtype == np.float32
    assert (factors > 0).all()
    assert np.isfinite(factors).all()


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 4)])
def test_the_search_is_at_least_as_good_as_every_other_by_its_own_measure(layer, bits):
    found = {name: registry.find("optimize.balance", name).factors([layer], bits) for name in STATISTICAL}
    errors = {name: expected_error(layer, factors, bits) for name, factors in found.items()}
    assert errors["search"] <= min(errors["none"], errors["smoothquant"]) * 1.0001


def test_at_eight_bits_a_multiplication_must_halve_the_error(layer):
    """Channels that are nearly alike stay as they are, though some balance would be a little better."""
    search = registry.find("optimize.balance", "search")
    rng = np.random.default_rng(0)
    alike = Observed(lambda: rng.standard_normal((5, 6)).astype(np.float32), 1, Channels.none(6), Channels.none(5))
    largest = np.array([1, 1.2, 0.9, 1.1, 1, 0.8], np.float32)
    alike.input.add(-largest, largest, largest.astype(float) ** 2, 3)
    assert (search.factors([alike], (8, 8)) == 1).all()
    assert (search.factors([alike], (4, 4)) != 1).any()
    assert (search.factors([layer], (8, 8)) != 1).any()


def test_the_expected_error_is_the_measured_one(layer):
    """Rounding noise is uniform and independent: the formula meets an experiment to a fifth."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((4000, 6)) * [1, 40, 1, 1, 0, 1]).astype(np.float32)
    module = torch.nn.Sequential(torch.nn.Linear(6, 5))
    seen = observe(module, [(0, {"input": x})])["0"]
    step = (x.max() - x.min()) / 255
    rounded = np.rint(x / step) * step
    top = np.abs(seen.weight).max(1, keepdims=True) / 127
    weight = np.rint(seen.weight / top) * top
    measured = ((rounded @ weight.T - x @ seen.weight.T) ** 2).mean(0).sum()
    assert expected_error(seen, np.ones(6, np.float32), (8, 8)) == pytest.approx(measured, rel=0.5)
