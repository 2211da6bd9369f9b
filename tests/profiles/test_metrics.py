"""Every metric of the folder keeps its contract; each one's numbers against a closed form, another library or another way."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from edgediffusion.errors import ArgumentError
from edgediffusion.profiles import gaussian, judges
from edgediffusion.profiles.bootstrap import Bootstrap, interval
from edgediffusion.profiles.judge import Judge
from edgediffusion.profiles.metrics import (
    HIGHER,
    LOWER,
    Seen,
    View,
    agreement,
    frechet,
    frechet_to_reference,
    of_kind,
    perceptual,
    psnr,
    ssim,
)
from edgediffusion.registry import find, names

NEEDS = ("", "features", "layers", "classes", "real")
KINDS = ("pairs", "alone", "between")


@pytest.fixture(scope="module")
def judge() -> Judge:
    return judges.load("fashion", threads=1)


def pictures(count: int, seed: int = 0) -> np.ndarray:
    """Bright boxes of many sizes on black, [count, 32, 32, 1]."""
    rng = np.random.default_rng(seed)
    drawn = np.zeros((count, 32, 32, 1), np.float32)
    for picture in drawn:
        top, left = rng.integers(2, 12, 2)
        picture[top : top + rng.integers(6, 18), left : left + rng.integers(6, 18)] = rng.uniform(0.2, 1)
    return drawn


def noisy(pixels: np.ndarray, amount: float) -> np.ndarray:
    return np.clip(pixels + np.random.default_rng(1).normal(0, amount, pixels.shape), 0, 1).astype(np.float32)


def scores(name: str, judge: Judge, pixels: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The values of any metric: one a picture, or one for each of four resamples."""
    metric, looks = find("profiles.metrics", name), [judge.look(x) for x in (pixels, reference)]
    if hasattr(metric, "pairs"):
        return metric.pairs(*(View(x, look.layers) for x, look in zip((pixels, reference), looks, strict=True)))
    wanted = looks[1].logits.argmax(1)
    seen = [Seen(look.features, look.logits.argmax(1), wanted) for look in looks]
    counts = Bootstrap(resamples=3).counts(len(pixels))
    return metric.alone(seen[0], judge, counts) if hasattr(metric, "alone") else metric.between(*seen, judge, counts)


# --- the contract


@pytest.mark.parametrize("name", names("profiles.metrics"))
def test_a_metric_says_what_its_values_are_and_is_of_one_kind(name: str) -> None:
    metric = find("profiles.metrics", name)
    assert metric.BETTER in (HIGHER, LOWER)
    assert metric.NEEDS in NEEDS
    assert isinstance(metric.UNIT, str)
    assert sum(hasattr(metric, kind) for kind in KINDS) == 1
    assert metric.__doc__


def test_the_kinds_share_out_the_folder() -> None:
    assert sorted(name for kind in KINDS for name in of_kind(kind)) == sorted(names("profiles.metrics"))


@pytest.mark.parametrize("name", sorted(set(names("profiles.metrics")) - {"frechet"}))  # boxes may look more like clothes with noise
def test_the_more_noise_the_worse(name: str, judge: Judge) -> None:
    clean = pictures(160)
    found = [float(np.median(scores(name, judge, noisy(clean, amount), clean))) for amount in (0.0, 0.03, 0.1)]
    better_first = found if find("profiles.metrics", name).BETTER == LOWER else [-v for v in found]
    assert better_first == sorted(better_first)
    assert better_first[0] < better_first[1] < better_first[2]


@pytest.mark.parametrize("name", sorted(of_kind("pairs")))
def test_a_pair_counts_alone_and_both_ways(name: str, judge: Judge) -> None:
    clean = pictures(5)
    found = scores(name, judge, noisy(clean, 0.1), clean)
    assert found.shape == (5,)
    assert found == pytest.approx([scores(name, judge, noisy(clean, 0.1)[i : i + 1], clean[i : i + 1])[0] for i in range(5)], rel=1e-5)
    assert found == pytest.approx(scores(name, judge, clean, noisy(clean, 0.1)), rel=1e-9)


@pytest.mark.parametrize(("name", "best"), [("psnr", 150.0), ("ssim", 1.0), ("perceptual", 0.0), ("agreement", 1.0)])
def test_equal_pictures_get_the_best_there_is(name: str, best: float, judge: Judge) -> None:
    assert scores(name, judge, pictures(4), pictures(4)) == pytest.approx(best)


def test_pictures_without_a_difference_are_no_distance_apart_however_few(judge: Judge) -> None:
    assert scores("frechet-to-reference", judge, pictures(3), pictures(3)) == pytest.approx(0, abs=1e-3)  # features reach 10


# --- psnr and ssim


def waves(channels: int) -> np.ndarray:
    y, x = np.mgrid[:24, :20] / 8
    return np.stack([0.5 + 0.4 * np.sin(x * (k + 1) + y) for k in range(channels)], -1)


def ripples(channels: int) -> np.ndarray:
    y, x = np.mgrid[:24, :20]
    return np.clip(waves(channels) + 0.1 * np.cos((x * y) % 7)[..., None], 0, 1)


@pytest.mark.parametrize(("channels", "expected"), [(1, 0.6600336006658235), (3, 0.7672858321974406)])
def test_ssim_is_that_of_scikit_image(channels: int, expected: float) -> None:
    """scikit-image 0.26.0: structural_similarity(data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)."""
    assert ssim.ssim(waves(channels), ripples(channels)) == pytest.approx(expected, abs=1e-12)


def test_psnr_is_that_of_scikit_image_and_of_the_formula() -> None:
    assert psnr.psnr_db(waves(1), ripples(1)) == pytest.approx(21.99995042975246, abs=1e-10)
    assert psnr.psnr_db(np.full((4, 4, 1), 0.1), np.zeros((4, 4, 1))) == pytest.approx(20.0)
    assert math.isinf(psnr.psnr_db(waves(1), waves(1)))


def test_ssim_by_its_definition_at_one_place() -> None:
    """Equation 13 written out for a picture of one window's size."""
    a, b = waves(1)[:11, :11, 0], ripples(1)[:11, :11, 0]
    axis = np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
    w = np.outer(axis, axis) / np.outer(axis, axis).sum()
    ma, mb = (w * a).sum(), (w * b).sum()
    va, vb, cov = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum(), (w * (a - ma) * (b - mb)).sum()
    expected = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    assert ssim.ssim(a[..., None], b[..., None]) == pytest.approx(expected, rel=1e-12)


def test_ssim_refuses_a_picture_smaller_than_its_window() -> None:
    with pytest.raises(ArgumentError, match=r"too small for SSIM. Got: \(24, 10\). Allowed: 11 pixels"):
        ssim.ssim(waves(1)[:, :10], ripples(1)[:, :10])


# --- perceptual


def test_perceptual_by_hand() -> None:
    """Two layers of one picture: unit vectors at right angles are 2 apart, at equal directions 0, whatever their length."""
    pixels = np.zeros((1, 1, 1, 1))
    first, second = np.array([[[3.0, 5.0], [0.0, 0.0]]]), np.array([[[1.0], [1.0]]])
    other, longer = np.array([[[0.0, 1.0], [7.0, 0.0]]]), 10 * second
    assert perceptual.pairs(View(pixels, (first, second)), View(pixels, (other, longer))) == pytest.approx([(1.0 + 0.0) / 2])


def test_a_place_where_nothing_answers_in_both_counts_as_equal() -> None:
    silent = View(np.zeros((1, 1, 1, 1)), (np.zeros((1, 4, 9)),))
    assert perceptual.pairs(silent, silent) == pytest.approx([0.0])


# --- Fréchet


def test_frechet_of_one_dimension() -> None:
    a, b = (gaussian.Gaussian(np.array([m]), np.array([[s**2]]), 9) for m, s in ((1.0, 2.0), (4.0, 0.5)))
    assert gaussian.frechet(a, b) == pytest.approx(3**2 + 1.5**2)


def test_frechet_of_two_dimensions() -> None:
    """tr (S T)^(1/2) = (tr S T + 2 det(S T)^(1/2))^(1/2) for 2 x 2."""
    s, t = np.array([[2.0, 0.6], [0.6, 1.0]]), np.array([[1.0, -0.3], [-0.3, 3.0]])
    expected = 3 + 4 - 2 * np.sqrt(np.trace(s @ t) + 2 * np.sqrt(np.linalg.det(s @ t)))
    a, b = gaussian.Gaussian(np.zeros(2), s, 9), gaussian.Gaussian(np.zeros(2), t, 9)
    assert gaussian.frechet(a, b) == pytest.approx(expected)
    assert gaussian.frechet(b, a) == pytest.approx(expected)
    assert gaussian.frechet(a, b, root_a=gaussian.root(s)) == pytest.approx(expected)


def test_frechet_of_many_dimensions_is_that_of_the_general_eigenvalues() -> None:
    rng = np.random.default_rng(0)
    a, b = (gaussian.fit(rng.normal(m, 1, (200, 24)) @ rng.normal(size=(24, 24))) for m in (0, 0.3))
    roots = np.sqrt(np.linalg.eigvals(a.covariance @ b.covariance).real.clip(0)).sum()
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * roots
    assert gaussian.frechet(a, b) == pytest.approx(expected)


def test_fewer_pictures_than_features_still_have_a_distance() -> None:
    rng = np.random.default_rng(0)
    few = gaussian.fit(rng.normal(size=(5, 40)))
    assert gaussian.frechet(few, few) == pytest.approx(0, abs=1e-6)  # root of float64 rounding, squared sums of 40
    assert gaussian.frechet(few, gaussian.fit(rng.normal(size=(5, 40)))) > 1


def test_a_fit_is_that_of_numpy_also_of_a_resample() -> None:
    features = np.random.default_rng(0).normal(1000, 1, (30, 4))
    drawn = Bootstrap(resamples=2, seed=5).draws(30)
    itself, *others = gaussian.resampled(features, Bootstrap(resamples=2, seed=5).counts(30))
    for fitted, rows in zip((itself, *others), (np.arange(30), *drawn), strict=True):
        assert fitted.mean == pytest.approx(features[rows].mean(0), rel=1e-14)
        assert fitted.covariance == pytest.approx(np.cov(features[rows], rowvar=False), rel=1e-9)
    with pytest.raises(ArgumentError, match="at least two"):
        gaussian.fit(features[:1])


def test_more_pictures_of_the_same_kind_come_nearer(judge: Judge) -> None:
    """What the number of pictures adds, about 1 / n: the reason to compare at one number only."""
    found = [judge.yardstick("frechet", n) for n in (64, 256, 1024, 4096, 60000)]
    assert all(a > b for a, b in itertools.pairwise(found))
    assert found[1] * 256 == pytest.approx(found[2] * 1024, rel=0.2)


# --- agreement


def test_agreement_counts_what_was_asked_for() -> None:
    seen = Seen(np.zeros((5, 1)), chosen=np.array([0, 1, 1, 2, 0]), wanted=np.array([0, 1, 2, 2, -1]))
    counts = np.array([[1, 1, 1, 1, 1], [4, 0, 1, 0, 0], [0, 0, 0, 0, 5]], float)
    nobody: Judge = None  # type: ignore[assignment]  # agreement does not look at it
    assert agreement.alone(seen, nobody, counts) == pytest.approx([0.75, 0.8, 0.75])


# --- the bootstrap


def test_resamples_are_the_same_for_the_same_seed_and_counts_are_those_draws() -> None:
    bootstrap = Bootstrap(resamples=7, seed=3)
    draws, counts = bootstrap.draws(10), bootstrap.counts(10)
    assert np.array_equal(draws, Bootstrap(resamples=7, seed=3).draws(10))
    assert not np.array_equal(draws, Bootstrap(resamples=7, seed=4).draws(10))
    assert counts.shape == (8, 10)
    assert counts.sum(1) == pytest.approx(10)
    assert (counts[0] == 1).all()
    assert counts[1:] @ np.arange(10) == pytest.approx(draws.sum(1))


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(0).normal(5, 2, 400)
    low, high = interval(values[Bootstrap(4000).draws(400)].mean(1))
    half = 1.96 * values.std() / math.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_interval_of_a_frechet_distance_covers_what_such_sets_have_on_average(shift: float) -> None:
    rng, resamples, items, features = np.random.default_rng(0), 100, 80, 6
    real = gaussian.Gaussian(np.zeros(features), np.eye(features), 10_000)
    sets = rng.normal(shift, 1, (300, items, features))
    expected = np.mean([gaussian.frechet(real, gaussian.fit(x)) for x in sets])
    covered = missed_by_plain_percentiles = 0
    for x in sets[:60]:
        found = np.array([gaussian.frechet(real, fitted) for fitted in gaussian.resampled(x, Bootstrap(resamples).counts(items))])
        low, high = interval(gaussian.centred(found)[1:])
        covered += low <= expected <= high
        missed_by_plain_percentiles += interval(found[1:])[0] > found[0]
    assert covered >= 0.85 * 60  # 95 of 100 is the aim; 51 of 60 leaves three standard deviations of a count
    if shift == 0:  # the distance is nothing but the number of pictures, and that doubles in a resample
        assert missed_by_plain_percentiles > 0.75 * 60


def test_centring_moves_resamples_to_the_value_and_never_below_zero() -> None:
    assert gaussian.centred(np.array([2.0, 5.0, 7.0, 9.0])) == pytest.approx([2.0, 0.0, 2.0, 4.0])
    assert gaussian.centred(np.array([1.0, 1.0, 9.0])) == pytest.approx([1.0, 0.0, 5.0])


@pytest.mark.parametrize("settings", [{"resamples": 0}, {"seed": -1}])
def test_a_bootstrap_that_cannot_be_is_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ArgumentError, match="cannot be done"):
        Bootstrap(**settings)


def test_frechet_metrics_give_the_distance_itself_first(judge: Judge) -> None:
    looks = [judge.look(x).features for x in (pictures(20), pictures(20, seed=1))]
    seen = [Seen(f, np.zeros(20), np.zeros(20)) for f in looks]
    counts = Bootstrap(2).counts(20)
    assert judge.real is not None
    assert frechet.alone(seen[0], judge, counts)[0] == pytest.approx(gaussian.frechet(gaussian.fit(looks[0]), judge.real), rel=1e-6)
    expected = gaussian.frechet(gaussian.fit(looks[1]), gaussian.fit(looks[0]))
    assert frechet_to_reference.between(*seen, judge, counts)[0] == pytest.approx(expected, rel=1e-6)
