"""Measuring pictures, and comparing bundles: the same figures by whatever way, none without its interval, and every refusal."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgediffusion.bundle import Bundle
from edgediffusion.errors import ArgumentError, BundleError
from edgediffusion.profiles import judges, quality
from edgediffusion.profiles.bootstrap import Bootstrap
from edgediffusion.profiles.judge import Judge
from edgediffusion.profiles.metrics import of_kind
from edgediffusion.profiles.metrics.psnr import psnr_db
from edgediffusion.profiles.quality import PairScore, Quality, Reference, SetScore, compare, measure
from edgediffusion.profiles.quality_table import quality_table
from edgediffusion.runtimes import Pipeline
from tests.runtimes.tiny import SAMPLING, write_bundle

FEW = Bootstrap(resamples=50)
PROMPTS = ["a red shirt", "a blue shoe", "a cat"]


@pytest.fixture(scope="module")
def judge() -> Judge:
    return judges.load("fashion", threads=1)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("reference") / "bundle")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same networks with another scale of the latents: pictures that are near, and not the same."""
    return write_bundle(tmp_path_factory.mktemp("other") / "bundle", sampling=replace(SAMPLING, latent_scale=0.55))


def pictures(count: int, *, size: int = 32, channels: int = 1, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).random((count, size // 8, size // 8, channels)).astype(np.float32)
    return coarse.repeat(8, 1).repeat(8, 2)


def near(pixels: np.ndarray, amount: float = 0.05) -> np.ndarray:
    return np.clip(pixels + np.random.default_rng(9).normal(0, amount, pixels.shape), 0, 1).astype(np.float32)


# --- measure


def test_without_a_judge_there_are_psnr_and_ssim() -> None:
    pixels = pictures(20, channels=3)
    found = measure(near(pixels), pixels, bootstrap=FEW)
    assert [score.metric for score in found.pairs] == ["psnr", "ssim"]
    assert found.sets == ()
    assert found.judge is None
    assert set(found.left_out) == {"perceptual", "agreement", "frechet", "frechet-to-reference"}
    assert set(found.left_out.values()) == {"it needs a judge"}
    one_by_one = [psnr_db(a, b) for a, b in zip(near(pixels), pixels, strict=True)]
    score = found.pair("psnr")
    assert (score.median, score.worst) == pytest.approx((np.median(one_by_one), min(one_by_one)))
    assert score.tenth == pytest.approx(np.percentile(one_by_one, 10))
    assert score.worst < score.tenth < score.low < score.median < score.high


def test_with_a_judge_there_is_every_metric(judge: Judge) -> None:
    pixels = pictures(40)
    prompts = [judge.prompts[i % 10] for i in range(40)]
    found = measure(near(pixels), pixels, prompts=prompts, judge=judge, bootstrap=FEW)
    assert [score.metric for score in found.pairs] == sorted(of_kind("pairs"))
    assert {score.metric for score in found.sets} == set(of_kind("alone")) | set(of_kind("between"))
    assert found.left_out == {}
    assert (found.pictures, found.judged, found.judge, found.resamples) == (40, 40, "fashion", 50)
    for score in (*found.pairs, *found.sets):
        value = score.median if isinstance(score, PairScore) else score.value
        assert score.low <= value <= score.high, score
    worse = found.pair("perceptual")
    assert worse.better == "lower"
    assert worse.median < worse.tenth < worse.worst
    frechet = found.set("frechet")
    assert frechet.relative == pytest.approx(frechet.value / frechet.reference)
    assert frechet.relative_low <= frechet.relative <= frechet.relative_high
    assert frechet.real == judge.yardstick("frechet", 40)
    assert found.set("frechet-to-reference").reference is None


def test_equal_pictures_have_no_difference_to_tell(judge: Judge) -> None:
    pixels = pictures(12)
    found = measure(pixels, pixels, prompts=["dress"] * 12, judge=judge, bootstrap=FEW)
    assert dataclasses.astuple(found.pair("psnr"))[3:] == (150.0,) * 5
    assert dataclasses.astuple(found.pair("ssim"))[3:] == pytest.approx((1.0,) * 5)
    for name in ("frechet", "agreement"):
        score = found.set(name)
        assert score.value == score.reference
        assert score.relative in (1.0, None)


def test_figures_do_not_depend_on_the_batch_nor_on_what_was_measured_before(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, prompts = pictures(21), ["bag"] * 21
    once = measure(near(pixels), pixels, prompts=prompts, judge=judge, bootstrap=FEW)
    again = Reference(pixels, prompts=prompts, judge=judge, bootstrap=FEW)
    again.measure(near(pixels, 0.2))
    assert again.measure(near(pixels)) == once
    monkeypatch.setattr(quality, "BATCH", 4)
    in_fours = measure(near(pixels), pixels, prompts=prompts, judge=judge, bootstrap=FEW)
    assert in_fours == once  # the network has batches of its own


def test_the_references_own_figures_are_found_out_once(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    metric = of_kind("alone")["frechet"]
    original = metric.alone
    monkeypatch.setattr(metric, "alone", lambda *given: calls.append(1) or original(*given))
    reference = Reference(pictures(6), judge=judge, bootstrap=FEW)
    reference.measure(near(pictures(6)))
    reference.measure(near(pictures(6), 0.2))
    assert len(calls) == 3


def test_only_prompts_that_name_one_class_are_judged(judge: Judge) -> None:
    pixels = pictures(4)
    found = measure(pixels, pixels, prompts=["dress", "a heart", "dress and bag", "bag"], judge=judge, bootstrap=FEW)
    assert found.judged == 2
    none = measure(pixels, pixels, prompts=["a heart"] * 4, judge=judge, bootstrap=FEW)
    assert none.judged == 0
    assert none.left_out == {"agreement": "no prompt names one class of the judge"}


def test_a_metric_is_left_out_where_the_judge_lacks_what_it_needs(judge: Judge) -> None:
    features_only = replace(judge, outputs=replace(judge.outputs, layers=(), logits=None), real=None)
    found = measure(pictures(4), pictures(4), prompts=["dress"] * 4, judge=features_only, bootstrap=FEW)
    assert [score.metric for score in found.sets] == ["frechet-to-reference"]
    assert found.left_out == {
        "perceptual": "the judge 'fashion' has no layers",
        "agreement": "the judge 'fashion' has no classes",
        "frechet": "the judge 'fashion' has no statistics of real pictures",
    }


@pytest.mark.parametrize(
    ("pixels", "reference", "prompts", "message"),
    [
        (pictures(3), pictures(2), (), r"different shapes cannot be compared. Got: \(3, 32, 32, 1\) and, of the reference, \(2, 32"),
        (pictures(3, channels=3), pictures(3), (), "different shapes"),
        (pictures(1), pictures(1), (), "no pictures to compare with"),
        (pictures(3)[0], pictures(3)[0], (), "no pictures to compare with"),
        (pictures(3), pictures(3), ["dress"], "1 prompts for 3 pictures"),
        (pictures(3) * 255, pictures(3), (), "are no pictures. Got: .* to 2.*. Allowed: 0 to 1"),
        (pictures(3), pictures(3) * np.nan, (), "are no pictures. Got: nan to nan"),
        (pictures(3, size=8), pictures(3, size=8), (), "too small for SSIM"),
    ],
)
def test_pictures_that_cannot_be_compared_are_refused(pixels: np.ndarray, reference: np.ndarray, prompts: list[str], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        measure(pixels, reference, prompts=prompts, bootstrap=FEW)


# --- compare


def test_bundles_are_compared_by_pictures_from_the_same_noise(other: Bundle, reference: Bundle) -> None:
    found = compare(other, reference, prompts=PROMPTS, samples=20, seed=5, bootstrap=FEW)
    drawn = []
    for bundle in (other, reference):
        pipeline = Pipeline.from_bundle(bundle)
        drawn.append(np.concatenate([pipeline(PROMPTS[i % 3], seed=5 + i).pixels for i in range(20)]))
    expected = measure(*drawn, prompts=[PROMPTS[i % 3] for i in range(20)], bootstrap=FEW)
    for mine, theirs in zip(found.pairs, expected.pairs, strict=True):
        assert dataclasses.astuple(mine)[3:] == pytest.approx(dataclasses.astuple(theirs)[3:], rel=1e-5)  # batches of a network
    assert found.run is not None
    assert (found.run.prompts, found.run.seed, found.run.steps, found.run.guidance_scale) == (3, 5, 3, 5.0)
    assert found.pictures == 20


def test_the_same_comparison_twice_is_the_same(other: Bundle, reference: Bundle) -> None:
    first, again = (compare(other, reference, prompts=PROMPTS, samples=4, bootstrap=FEW) for _ in range(2))
    assert first == again
    assert first != compare(other, reference, prompts=PROMPTS, samples=4, seed=1, bootstrap=FEW)


def test_a_bundle_against_itself(reference: Bundle) -> None:
    assert compare(reference, reference, prompts=PROMPTS, samples=3, bootstrap=FEW).pair("psnr").worst == 150.0


def test_steps_and_guidance_are_each_bundles_own_or_what_was_asked_for(reference: Bundle, tmp_path: Path) -> None:
    fewer = write_bundle(tmp_path / "fewer", sampling=replace(SAMPLING, steps=2, guidance_scale=1.0))
    own = compare(fewer, reference, prompts=PROMPTS, samples=2, bootstrap=FEW).run
    asked = compare(fewer, reference, prompts=PROMPTS, samples=2, steps=1, guidance_scale=2.0, bootstrap=FEW).run
    assert own is not None
    assert asked is not None
    assert (own.steps, own.reference_steps, own.guidance_scale, own.reference_guidance_scale) == (2, 3, 1.0, 5.0)
    assert (asked.steps, asked.reference_steps, asked.guidance_scale, asked.reference_guidance_scale) == (1, 1, 2.0, 2.0)


@pytest.mark.parametrize(("side", "calls"), [(16, 1), (64, 2), (96, 5)])
def test_of_large_pictures_few_are_drawn_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int, calls: int) -> None:
    large = write_bundle(tmp_path / "large", sampling=replace(SAMPLING, height=side, width=side))
    seeds = []
    draw = Pipeline.__call__
    monkeypatch.setattr(Pipeline, "__call__", lambda self, part, **options: seeds.append(options["seed"]) or draw(self, part, **options))
    assert compare(large, large, prompts=PROMPTS, samples=5, steps=1, bootstrap=FEW).pictures == 5
    assert len(seeds) == 2 * calls
    assert [s for part in seeds[::2] for s in part] == list(range(5))


def test_a_prompt_that_was_cut_is_told(reference: Bundle) -> None:
    run = compare(reference, reference, prompts=["a very " + "big " * 9 + "cat"], samples=2, steps=1, bootstrap=FEW).run
    assert run is not None
    assert len(run.warnings) == 1
    assert "too long" in run.warnings[0]


def test_progress_counts_up_to_the_end(reference: Bundle) -> None:
    told: list[tuple[str, float]] = []
    compare(reference, reference, prompts=PROMPTS, samples=20, steps=1, bootstrap=FEW, progress=lambda *step: told.append(step))
    drawing = [part for label, part in told if label == "drawing"]
    assert drawing == sorted(drawing)
    assert (drawing[0], drawing[-1]) == (0.0, 1.0)
    assert told[-1] == ("measured", 1.0)


def test_bundles_of_different_sizes_are_refused(reference: Bundle, tmp_path: Path) -> None:
    larger = write_bundle(tmp_path / "larger", sampling=replace(SAMPLING, height=24))
    with pytest.raises(ArgumentError, match="Compare pipelines that draw the same size"):
        compare(larger, reference, prompts=PROMPTS, samples=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to draw. Got: no prompts"),
        ({"prompts": []}, "nothing to draw"),
        ({"prompts": PROMPTS, "samples": 1}, "Too few pictures"),
        ({"prompts": PROMPTS, "target": "toaster"}, "toaster"),
        ({"prompts": PROMPTS, "steps": 0}, "steps"),
    ],
)
def test_comparisons_that_cannot_be_made_are_refused(reference: Bundle, options: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        compare(reference, reference, **options)  # type: ignore[arg-type]


def test_a_bundle_that_cannot_draw_is_refused(reference: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot draw"):
        compare(reference, write_bundle(tmp_path / "parts", sampling=None), prompts=PROMPTS)


def test_without_prompts_those_of_the_judge_are_drawn(reference: Bundle, judge: Judge) -> None:
    red = replace(judge, prompts=("a red cat",), outputs=replace(judge.outputs, logits=None))
    with pytest.raises(ArgumentError, match="cannot see these colours"):  # and the tiny pipeline draws in colours
        compare(reference, reference, samples=2, judge=red, bootstrap=FEW)


# --- the table


def test_the_table_has_every_figure() -> None:
    found = Quality(
        pictures=8,
        judge="fashion",
        judged=6,
        resamples=100,
        pairs=(PairScore("psnr", "dB", "higher", 38.25, 38.0, 38.5, 36.5, 29.75),),
        sets=(
            SetScore("agreement", "", "higher", 0.5, 0.25, 0.75, 0.625, 0.375, 0.875, 0.8, 0.7, 0.9, 0.91),
            SetScore("far", "", "lower", 1.5, 1.25, 1.75),
        ),
        left_out={"frechet": "the judge has no statistics"},
        run=quality.Run("int8", "float", 3, 7, 4, 20, 2.0, 5.0, ()),
    )
    rows = [line.split() for line in quality_table(found).splitlines()]
    assert ["psnr,", "dB", "38.25", "38", "to", "38.5", "36.5", "29.75"] in rows
    agreement = "agreement 0.5 0.25 to 0.75 0.625 0.375 to 0.875 0.8 0.7 to 0.9 0.91"
    assert agreement.split() in rows
    assert ["far", "1.5", "1.25", "to", "1.75"] in rows
    lines = quality_table(found).splitlines()
    assert "int8 against float: 4 steps (20 of the reference), guidance 2 (5 of the reference), seeds from 7, 3 prompts in turn" in lines
    assert "8 pictures, 6 of them with a class to judge; judge: fashion" in lines
    assert "intervals: 95% of 100 resamples of the pictures" in lines
    assert lines[-1] == "no frechet: the judge has no statistics"
