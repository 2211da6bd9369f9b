"""Tuning caching policies on tiny networks that were cut: what is noted, what is tried, and which one is chosen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgediffusion.bundle import Bundle
from edgediffusion.errors import ArgumentError, BundleError, EdgeDiffusionError
from edgediffusion.profiles import tune_cache as module
from edgediffusion.profiles.cache_record import MODULATED, Changes, Recorder, _polynomial, watch
from edgediffusion.profiles.tune_cache import Outcome, best_marked, candidates, tune_cache
from edgediffusion.runtimes import Pipeline
from edgediffusion.runtimes.caching import resolve
from tests.runtimes.cuts import BLOCKS, CUT, write_cut_transformer, write_cut_unet
from tests.runtimes.tiny import write_bundle

pytest.importorskip("onnxruntime")

PROMPTS = ("a red shirt", "a cat")


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_cut_unet(tmp_path_factory.mktemp("cut") / "unet")


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_cut_transformer(tmp_path_factory.mktemp("cut") / "transformer")


def watched(bundle: Bundle, steps: int = 6) -> Changes:
    pipeline = Pipeline.from_bundle(bundle, threads=1)
    draw: Callable[[Recorder, int], object] = lambda recorder, i: pipeline(  # noqa: E731
        PROMPTS[0], num_inference_steps=steps, seed=i, cache=recorder
    )
    return watch(draw, 2, lambda label, part: None)


class TestChanges:
    def test_what_a_unet_could_reuse(self, unet: Bundle) -> None:
        changes = watched(unet)
        assert set(changes.similarity) == {CUT, "prediction"}
        assert (changes.polynomial, changes.ratios) == ("", "")
        for rows in changes.similarity.values():
            matrix = np.array(rows)
            assert matrix.shape == (6, 6)
            assert not matrix.diagonal().any()
            assert (matrix[~np.eye(6, dtype=bool)] > 0).all()

    def test_what_a_transformer_could_reuse(self, transformer: Bundle) -> None:
        changes = watched(transformer)
        assert set(changes.similarity) == {*BLOCKS, MODULATED, "prediction"}
        assert len(changes.ratios.split("/")) == 6
        assert changes.ratios.startswith("1/")
        assert resolve(f"teacache:polynomial={changes.polynomial}")
        assert resolve(f"magcache:ratios={changes.ratios}")

    def test_watching_changes_nothing(self, unet: Bundle, transformer: Bundle) -> None:
        for bundle in (unet, transformer):
            pipeline = Pipeline.from_bundle(bundle, threads=1)
            plain, noted = (pipeline(PROMPTS[0], num_inference_steps=4, cache=cache) for cache in ("none", Recorder()))
            np.testing.assert_allclose(noted.latents, plain.latents, atol=1e-5)

    def test_the_polynomial_finds_the_law_that_made_the_points(self) -> None:
        x = np.linspace(0.01, 0.5, 60)
        law = np.array([3.0, -2.0, 1.5, 0.25, 0.125])
        points = list(zip(x.tolist(), np.polyval(law, x).tolist(), strict=True))
        found = [float(value) for value in _polynomial(points).split("/")]
        np.testing.assert_allclose(found, law, rtol=1e-3)
        assert len(_polynomial(points[:15]).split("/")) == 2  # a line: few points hold no more
        noisy = [(a, 2 * a + 0.3 * b) for (a, _), b in zip(points, np.random.default_rng(0).standard_normal(60), strict=True)]
        assert len(_polynomial(noisy).split("/")) < 5  # what a high degree would follow is noise
        assert _polynomial(points[:5]) == "identity"
        assert _polynomial([]) == ""


class TestTuning:
    def test_every_candidate_runs(self, unet: Bundle, transformer: Bundle) -> None:
        for bundle in (unet, transformer):
            pipeline = Pipeline.from_bundle(bundle, threads=1)
            tried = candidates(bundle, 10, watched(bundle))
            assert len(set(tried)) == len(tried) > 10
            for policy in tried:
                assert np.isfinite(pipeline(PROMPTS[0], num_inference_steps=10, cache=policy).pixels).all()

    def test_names_the_fastest_that_holds_the_quality(self, unet: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = [Outcome("far", 0.2, 0.3, 25, 20, 19), Outcome("near", 0.5, 0.6, 41, 38, 35), Outcome("slow", 1, 1.2, 90, 80, 70)]
        monkeypatch.setattr(module, "_measure", lambda *rest: (tuple(rows), 10.0))
        chosen = {q: tune_cache(unet, PROMPTS, quality_db=q, samples=1, steps=3).chosen for q in (10, 20, 20.1, 38, 38.1, 79)}
        assert chosen == {10: "far", 20: "far", 20.1: "near", 38: "near", 38.1: None, 79: None}  # slower than no cache is no gain

    def test_only_what_nothing_else_beats_is_best(self) -> None:
        rows = [("c", 0.5, 30.0), ("a", 0.3, 25.0), ("d", 0.6, 29.0), ("b", 0.3, 20.0), ("e", 0.9, 50.0)]
        marked = best_marked([Outcome(name, 0.5, time, psnr, psnr, psnr) for name, time, psnr in rows])
        assert [(o.policy, o.best) for o in marked] == [("a", True), ("b", False), ("c", True), ("d", False), ("e", True)]

    def test_measures_against_the_uncached_picture(self, unet: Bundle) -> None:
        heard: list[str] = []
        found = tune_cache(
            unet,
            PROMPTS,
            samples=2,
            steps=6,
            policies=("none", "deepcache:interval=2", "deepcache:interval=1"),
            progress=lambda label, part: heard.append(label),
        )
        outcomes = {outcome.policy: outcome for outcome in found.outcomes}
        assert outcomes["none"].psnr_worst_db == outcomes["deepcache:interval=1"].psnr_worst_db == 150
        assert outcomes["deepcache:interval=2"].psnr_db < 100
        assert {name: outcome.calls for name, outcome in outcomes.items()} == {
            "none": 1,
            "deepcache:interval=2": 0.5,
            "deepcache:interval=1": 1,
        }
        assert (found.pictures, found.steps) == (2, 6)
        assert set(heard) == {"watching", "watched", "trying", "tried"}

    def test_a_bundle_without_cuts_has_one_policy_left(self, tmp_path: Path) -> None:
        found = tune_cache(write_bundle(tmp_path / "plain"), PROMPTS, samples=1, steps=6)
        assert {outcome.policy.partition(":")[0] for outcome in found.outcomes} == {"adaptive-diffusion"}

    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"prompts": ()}, ArgumentError, "nothing to draw"),
            ({"samples": 0}, ArgumentError, "nothing to draw.*0 samples"),
            ({"policies": ("deepcash",)}, ArgumentError, "Did you mean 'deepcache'"),
            ({"policies": ("fora",)}, BundleError, "another kind of network"),
            ({"sampler": "warp"}, EdgeDiffusionError, "No sampler is called 'warp'"),
        ],
    )
    def test_refusals(self, unet: Bundle, settings: dict[str, object], error: type[Exception], message: str) -> None:
        asked = {"prompts": PROMPTS, "samples": 1, "steps": 3, **settings}
        with pytest.raises(error, match=message):
            tune_cache(unet, **asked)  # type: ignore[arg-type]
