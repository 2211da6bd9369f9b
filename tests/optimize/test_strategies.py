"""Every calibration strategy of the folder keeps the contract; each has the numbers of its paper and of its code."""

import math
from dataclasses import replace

import numpy as np
import pytest

from edgediffusion import registry
from edgediffusion.errors import ArgumentError, UnknownName
from edgediffusion.optimize.calibration import Features, find_strategy, first_step, ndtc, stride, tdac, uncertainty, uniform

STRATEGIES = registry.names("optimize.calibration")
LOOKING = {"tdac", "uncertainty"}


def features_of(steps, seed=0, points=6, channels=5):
    """Features that drift: neighbouring steps are alike, and their scale changes along the trajectory."""
    rng = np.random.default_rng(seed)
    drift = rng.standard_normal((steps, points, channels)).cumsum(axis=0)
    return Features("middle", (drift * np.linspace(1, 3, steps)[:, None, None]).astype(np.float32))


class Looking:
    """Stands for the pass over the network; counts how often it is asked for."""

    def __init__(self, steps):
        self.cuts, self.steps = [], steps

    def __call__(self, cut):
        self.cuts.append(cut)
        return features_of(self.steps)


def unasked(cut):
    raise AssertionError("this strategy needs no features")


def counts_or_refusal(strategy, steps, samples, looking):
    try:
        return strategy.allocate(steps, samples, seed=3, features=looking)
    except ArgumentError as error:
        return str(error)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize(("steps", "samples"), [(1, 1), (2, 1), (4, 2), (20, 128), (50, 1024), (7, 100), (21, 40)])
def test_counts_sum_to_the_samples_and_repeat_under_a_seed(name, steps, samples):
    strategy = find_strategy(name)
    looking = Looking(steps)
    counts = counts_or_refusal(strategy, steps, samples, looking)
    if isinstance(counts, str):
        assert samples < steps
        assert f"{samples} items" in counts
        assert f"{steps} steps" in counts
        return
    assert counts.shape == (steps,)
    assert np.issubdtype(counts.dtype, np.integer)
    assert counts.sum() == samples
    assert (counts >= 0).all()
    assert (counts == strategy.allocate(steps, samples, seed=3, features=Looking(steps))).all()
    assert len(looking.cuts) == (name in LOOKING)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_says_whose_method_it_is(name):
    text = registry.find("optimize.calibration", name).__doc__
    assert any(f"{number}" in text for number in ("2211.15736", "2302.04304", "2401.04585", "2406.11100", "2305.18723"))


# --- uniform, first-step, stride


def test_uniform_is_even():
    counts = uniform.Strategy().allocate(20, 130, seed=0, features=unasked)
    assert set(counts) == {6, 7}


def test_first_step_has_them_all_at_the_noisiest():
    assert first_step.Strategy().allocate(4, 9, seed=0, features=unasked).tolist() == [9, 0, 0, 0]


@pytest.mark.parametrize(
    ("steps", "wanted", "expected"),  # METHODS' lists
    [(100, 20, range(0, 100, 5)), (50, 25, range(0, 50, 2)), (20, 20, range(20)), (250, 20, range(0, 250, 12))],
)
def test_stride_chooses_the_steps_of_its_code(steps, wanted, expected):
    assert stride.chosen_steps(steps, wanted) == expected
    counts = stride.Strategy(wanted).allocate(steps, 2 * len(expected), seed=0, features=unasked)
    assert np.flatnonzero(counts).tolist() == list(expected)
    assert set(counts) <= {0, 2}


def test_stride_has_more_steps_than_asked_for_where_they_do_not_divide():
    assert len(stride.chosen_steps(250, 20)) == 21


def test_stride_by_default_has_25_steps_or_all():
    assert np.count_nonzero(stride.Strategy().allocate(50, 128, seed=0, features=unasked)) == 25
    assert np.count_nonzero(stride.Strategy().allocate(20, 128, seed=0, features=unasked)) == 20


def test_stride_refuses_what_has_no_stride():
    with pytest.raises(ArgumentError, match=r"Got: 21\. Allowed: 1 to 20"):
        stride.Strategy(21).allocate(20, 128, seed=0, features=unasked)
    with pytest.raises(ArgumentError, match="Give 20 items or more.*wanted=7"):
        stride.Strategy().allocate(20, 7, seed=0, features=unasked)


# --- ndtc


def _cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def ndtc_counts(steps, samples, **options):
    return ndtc.Strategy(**options).allocate(steps, samples, seed=0, features=unasked)


@pytest.mark.parametrize(
    ("mean", "std", "clean", "noisy"),
    # Mass that clamping puts on the cleanest and on the noisiest step, P(N < 0) and P(N > 1): METHODS' golden values.
    [(0.4, 0.4, 0.1587, 0.0668), (0.5, 0.35, 0.0766, 0.0766)],
)
def test_ndtc_code_clips_the_mass_of_its_tails(mean, std, clean, noisy):
    assert _cdf(-mean / std) == pytest.approx(clean, abs=5e-5)
    assert 1 - _cdf((1 - mean) / std) == pytest.approx(noisy, abs=5e-5)
    steps, samples = 250, 20_000
    counts = ndtc_counts(steps, samples, mean_part=mean, std_part=std)
    # Besides the tail, a step holds about 1/250 of the law's bulk; the band is three standard deviations of a binomial.
    for found, tail, edge in ((counts[-1], clean, (0.0, 1 / steps)), (counts[0], noisy, (1 - 1 / steps, 1.0))):
        expected = tail + _cdf((edge[1] - mean) / std) - _cdf((edge[0] - mean) / std)
        assert found / samples == pytest.approx(expected, abs=3 * math.sqrt(expected * (1 - expected) / samples))


def test_ndtc_paper_has_variance_half_the_steps():
    counts = ndtc_counts(250, 50_000, variant="paper")
    t = np.repeat(np.arange(249, -1, -1), counts)
    assert t.mean() == pytest.approx(0.4 * 250 - 0.5, abs=0.2)  # floor shifts the mean by a half
    assert t.std() == pytest.approx(math.sqrt(125), abs=0.15)  # 11.18 steps, METHODS' golden value


def test_ndtc_resampling_leaves_no_pile_at_the_ends():
    resampled = ndtc_counts(250, 20_000, clip="resample")
    assert resampled.sum() == 20_000
    assert resampled[-1] < ndtc_counts(250, 20_000)[-1] / 10


def test_ndtc_leans_to_the_clean_side():
    counts = ndtc_counts(20, 1000)
    assert counts[10:].sum() > counts[:10].sum()


@pytest.mark.parametrize(
    "options", [{"variant": "skew"}, {"clip": "drop"}, {"mean_part": 1.5}, {"std_part": 0.0}, {"std_part": math.nan}], ids=str
)
def test_ndtc_refuses_options_that_cannot_be_used(options):
    with pytest.raises(ArgumentError, match="Allowed"):
        ndtc.Strategy(**options)


# --- tdac


DENSITY, VARIETY = np.array([0, 1, 3, 5, 5, 4, 2, 1]), np.array([9.0, 6, 3, 1, 1, 2, 5, 8])


def test_tdac_golden_counts():
    assert tdac.share(DENSITY, VARIETY, 1.2, 64).tolist() == [9, 7, 7, 8, 8, 7, 8, 10]


def test_tdac_repairs_a_sum_that_rounding_missed():
    # Scores 0, 1/2, 1/2, 1: of 5 items 0, 1.25, 1.25 and 2.5, which round to 0, 1, 1, 2. The largest gets the fifth.
    assert tdac.share(np.array([0, 1, 1, 2]), np.zeros(4), 1.0, 5).tolist() == [0, 1, 1, 3]
    # Scores 1, 1, 1, 0: of 5 items 1.67 each, which round to 2. The last of them that has one gives it back.
    assert tdac.share(np.array([1, 1, 1, 0]), np.zeros(4), 1.0, 5).tolist() == [2, 2, 1, 0]


@pytest.mark.parametrize(
    ("density", "variety", "expected"),
    [
        (np.full(4, 3), np.array([0.0, 1, 1, 2]), [0, 2, 2, 4]),  # D says nothing
        (np.array([0, 1, 1, 2]), np.full(4, 7.0), [0, 2, 2, 4]),  # V says nothing
        (np.full(4, 3), np.full(4, 7.0), [2, 2, 2, 2]),  # neither does
        (np.array([0]), np.array([0.0]), [8]),
    ],
    ids=["D", "V", "both", "one-step"],
)
def test_tdac_does_not_divide_by_zero(density, variety, expected):
    assert tdac.share(density, variety, 1.0, 8).tolist() == expected


def test_tdac_distances_are_the_formulas():
    values = features_of(5).values
    values[3, 2] = 0  # no direction
    distance, variety = tdac.pairs(Features("middle", values))
    wide = values.astype(np.float64)
    squared = np.square(wide[:, None] - wide[None]).mean(axis=(2, 3))
    norms = np.linalg.norm(wide, axis=-1)
    dots = np.einsum("ipc,jpc->ijp", wide, wide)
    products = norms[:, None] * norms[None]
    cosine = np.divide(dots, products, out=np.zeros_like(dots), where=products > 0)
    apart = (1 - cosine).sum(axis=-1)
    np.testing.assert_allclose(distance, squared, rtol=1e-5)
    np.testing.assert_allclose(variety, apart.sum(axis=1) - np.diag(apart), rtol=1e-5)
    assert tdac.density(distance, 0.0).tolist() == [0] * 5
    assert tdac.density(distance, np.inf).tolist() == [4] * 5
    # Half of the ten pairs, each of which counts for two steps.
    assert tdac.density(distance, None).sum() == 10


def counts_of(name, values, **options):
    return find_strategy(name, options).allocate(len(values), 200, seed=0, features=lambda cut: Features("middle", values)).tolist()


@pytest.mark.parametrize("name", sorted(LOOKING))
def test_what_looks_into_the_network_sees_no_scale(name):
    values = features_of(12).values
    assert counts_of(name, values) == counts_of(name, values * np.float32(1024))
    assert len(set(counts_of(name, values))) > 2


def test_tdac_settings_are_the_papers_and_can_be_replaced():
    values = features_of(12).values
    distance, variety = tdac.pairs(Features("middle", values))
    expected = tdac.share(tdac.density(distance, 0.3), variety, 5.0, 200).tolist()
    assert counts_of("tdac", values, setting="coco") == expected
    assert counts_of("tdac", values, setting="cifar", radius=0.3, variety=5) == expected


def test_tdac_asks_for_the_cut_it_was_told():
    looking = Looking(4)
    tdac.Strategy(cut="mid_block.resnets.0").allocate(4, 8, seed=0, features=looking)
    assert looking.cuts == ["mid_block.resnets.0"]


@pytest.mark.parametrize("options", [{"setting": "lsun"}, {"radius": -1.0}, {"variety": -1.0}], ids=str)
def test_tdac_refuses_options_that_cannot_be_used(options):
    with pytest.raises(ArgumentError, match="Allowed"):
        tdac.Strategy(**options)


# --- uncertainty


def test_uncertainty_chooses_the_largest_less_what_it_costs_and_the_last_of_equals():
    # w = 1 * 3 / 6 = 0.5. Scores: (0, 1, 1) -> 2; (0, 1, .5) -> 1; (0, .5, .5) -> 2; (0, .5, 0) -> 1; (0, 0, 0) -> 2;
    # (0, 0, -.5) -> 1.
    assert uncertainty.choose(np.array([2.0, 5.0, 5.0]), 6, 1.0).tolist() == [0, 3, 3]


def test_uncertainty_at_a_penalty_of_one_gives_the_most_undecided_one_even_share_more():
    counts = uncertainty.choose(np.array([1.0, 2.0, 3.0]), 300, 1.0)
    assert counts.sum() == 300
    assert abs((counts[2] - counts[0]) - 100) <= 1
    halved = uncertainty.choose(np.array([1.0, 2.0, 3.0]), 300, 2.0)
    assert abs((halved[2] - halved[0]) - 50) <= 1


def test_uncertainty_without_a_penalty_stays_where_it_is_largest():
    assert uncertainty.choose(np.array([1.0, 3.0, 2.0]), 7, 0.0).tolist() == [0, 7, 0]


def test_uncertainty_is_even_where_nothing_differs():
    assert uncertainty.choose(np.full(4, 0.7), 8, 1.0).tolist() == [2, 2, 2, 2]


def test_uncertainty_is_largest_half_way_between_groups():
    # a = 0, 0, 1/2, 1/2, 1, 1, whose quantiles at 1/4 and 3/4 are 1/8 and 7/8, by interpolation; d = 3/4.
    ranges = np.array([[1.0, 1.0], [math.sqrt(2), math.sqrt(2)], [2.0, 2.0]])
    h = uncertainty.entropy(ranges, 2)
    near, far = (math.exp(-(distance**2) / (2 * 0.75**2)) for distance in (1 / 8, 7 / 8))
    p = near / (near + far)
    assert h[0] == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))
    assert h[1] == pytest.approx(math.log(2))
    assert h[2] == pytest.approx(h[0])


def test_uncertainty_skips_the_first_steps():
    counts = counts_of("uncertainty", features_of(10).values)
    assert counts[:3] == [0, 0, 0]
    assert min(counts[3:]) > 0
    assert counts_of("uncertainty", features_of(10).values, skip=0)[0] > 0


@pytest.mark.parametrize("values", [np.zeros((6, 3, 4), np.float32), np.ones((6, 3, 4), np.float32)], ids=["zeros", "ones"])
@pytest.mark.parametrize("name", sorted(LOOKING))
def test_features_that_never_change_give_an_even_share(name, values):
    counts = counts_of(name, values, **({"skip": 0} if name == "uncertainty" else {}))
    assert set(counts) == {33, 34}


@pytest.mark.parametrize("options", [{"groups": 1}, {"penalty": -0.1}, {"skip": 1.0}], ids=str)
def test_uncertainty_refuses_options_that_cannot_be_used(options):
    with pytest.raises(ArgumentError, match="Allowed"):
        uncertainty.Strategy(**options)


# --- options from a command line


def test_options_become_their_types():
    assert find_strategy("ndtc", {"variant": "paper", "std_part": "0.35"}) == ndtc.Strategy("paper", std_part=0.35)
    assert find_strategy("stride", {"wanted": "10"}) == stride.Strategy(10)
    assert find_strategy("tdac", {"radius": "3"}) == replace(tdac.Strategy(), radius=3.0)
    assert find_strategy("tdac", {"radius": 3, "cut": None}) == replace(tdac.Strategy(), radius=3.0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ndtc", {"std": "1"}, "'ndtc' has no option 'std'.*std_part \\(a number, by default 0.4\\)"),
        ("uniform", {"every": "2"}, "it has no options"),
        ("ndtc", {"std_part": "wide"}, "'std_part' of ndtc cannot be used. Got: 'wide'. Allowed: a number"),
        ("stride", {"wanted": "2.5"}, "Allowed: a whole number"),
        ("stride", {"wanted": 2.5}, "Allowed: a whole number"),
        ("stride", {"wanted": "0"}, "Allowed: 1 to"),
    ],
    ids=str,
)
def test_bad_options_are_refused_with_what_is_allowed(name, options, message):
    with pytest.raises(ArgumentError, match=message):
        find_strategy(name, options)


def test_an_unknown_strategy_lists_the_known_ones():
    with pytest.raises(UnknownName, match="Did you mean 'tdac'"):
        find_strategy("tdca")
