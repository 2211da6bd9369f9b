"""Every calibration strategy of the folder keeps the contract; NDTC has the laws of its paper and of its code."""

import math

import numpy as np
import pytest

from edgediffusion import registry
from edgediffusion.errors import ArgumentError
from edgediffusion.optimize.calibration import ndtc, uniform

STRATEGIES = registry.names("optimize.calibration")


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize(("steps", "samples"), [(1, 1), (4, 2), (20, 128), (50, 1024), (7, 100)])
def test_counts_sum_to_the_samples_and_repeat_under_a_seed(name, steps, samples):
    strategy = registry.find("optimize.calibration", name).Strategy()
    counts = strategy.allocate(steps, samples, seed=3)
    assert counts.shape == (steps,)
    assert np.issubdtype(counts.dtype, np.integer)
    assert counts.sum() == samples
    assert (counts >= 0).all()
    assert (counts == strategy.allocate(steps, samples, seed=3)).all()


def test_uniform_is_even():
    counts = uniform.Strategy().allocate(20, 130, seed=0)
    assert set(counts) == {6, 7}


def _cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


@pytest.mark.parametrize(
    ("mean", "std", "clean", "noisy"),
    # Mass that clamping puts on the cleanest and on the noisiest step: P(N < 0) and P(N > 1).
    [(0.4, 0.4, _cdf(-1.0), 1 - _cdf(1.5)), (0.5, 0.35, _cdf(-0.5 / 0.35), 1 - _cdf(0.5 / 0.35))],
)
def test_ndtc_code_clips_the_mass_of_its_tails(mean, std, clean, noisy):
    steps, samples = 250, 20_000
    counts = ndtc.Strategy(mean_part=mean, std_part=std).allocate(steps, samples, seed=0)
    # Besides the tail, a step holds about 1/250 of the law's bulk; the band is three standard deviations of a binomial.
    for found, tail, edge in ((counts[-1], clean, (0.0, 1 / steps)), (counts[0], noisy, (1 - 1 / steps, 1.0))):
        expected = tail + _cdf((edge[1] - mean) / std) - _cdf((edge[0] - mean) / std)
        assert found / samples == pytest.approx(expected, abs=3 * math.sqrt(expected * (1 - expected) / samples))


def test_ndtc_paper_has_variance_half_the_steps():
    counts = ndtc.Strategy(variant="paper").allocate(250, 50_000, seed=0)
    t = np.repeat(np.arange(249, -1, -1), counts)
    assert t.mean() == pytest.approx(0.4 * 250 - 0.5, abs=0.2)  # floor shifts the mean by a half
    assert t.std() == pytest.approx(math.sqrt(125), abs=0.15)  # 11.18 steps, METHODS' golden value


def test_ndtc_resampling_leaves_no_pile_at_the_ends():
    clamped = ndtc.Strategy().allocate(250, 20_000, seed=0)
    resampled = ndtc.Strategy(clip="resample").allocate(250, 20_000, seed=0)
    assert resampled.sum() == 20_000
    assert resampled[-1] < clamped[-1] / 10


def test_ndtc_leans_to_the_clean_side():
    counts = ndtc.Strategy().allocate(20, 1000, seed=0)
    assert counts[10:].sum() > counts[:10].sum()


@pytest.mark.parametrize("options", [{"variant": "skew"}, {"clip": "drop"}])
def test_ndtc_refuses_unknown_options(options):
    with pytest.raises(ArgumentError, match="Allowed"):
        ndtc.Strategy(**options)
