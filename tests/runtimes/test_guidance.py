"""Guidance: against diffusers, where it is off, how many rows are run, thresholds, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgediffusion.bundle import Component
from edgediffusion.errors import ArgumentError
from edgediffusion.runtimes import Pipeline
from edgediffusion.runtimes.guidance import DynamicThreshold, Guidance
from edgediffusion.runtimes.noise import TorchNoise
from edgediffusion.runtimes.schedules import Point

from .tiny import DENOISE, ENCODE, WIDTH, FakeSession, write_bundle

PROMPT = "a red shirt"


def encode(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.repeat(feeds["input_ids"][:, :, None].astype(np.float32) / 10, WIDTH, axis=2)


def predict(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    """Rows do not see each other, so a row says the same in a batch of any size."""
    meant = feeds["encoder_hidden_states"].mean(axis=(1, 2)).reshape(-1, 1, 1, 1)
    slope = np.linspace(-1, 1, feeds["sample"].shape[-1], dtype=np.float32)
    return np.tanh(0.3 * feeds["sample"] + meant * slope)


def pipeline(folder: Path, denoise: Component = DENOISE) -> tuple[Pipeline, FakeSession]:
    bundle = replace(write_bundle(folder), components=(ENCODE, denoise))
    network = FakeSession.of(denoise, predict)
    return Pipeline(bundle, {"text_encoder": FakeSession.of(ENCODE, encode), "unet": network}), network


def fixed_batch(rows: int) -> Component:
    """The denoiser as an engine has it that was built for one number of rows."""

    def fixed(spec: Any) -> Any:
        return replace(spec, shape=tuple(rows if axis == "batch" else axis for axis in spec.shape))

    return replace(DENOISE, inputs=tuple(map(fixed, DENOISE.inputs)), outputs=tuple(map(fixed, DENOISE.outputs)))


@pytest.fixture
def fakes(tmp_path: Path) -> tuple[Pipeline, FakeSession]:
    return pipeline(tmp_path / "bundle")


class TestRescale:
    output = np.concatenate([TorchNoise(1).normal((3, 4, 8, 8)), 0.7 * TorchNoise(2).normal((3, 4, 8, 8))])

    @pytest.mark.parametrize("rescale", [0.0, 0.3, 0.7, 1.0])
    def test_equals_diffusers(self, rescale: float) -> None:
        torch = pytest.importorskip("torch")
        module = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
        unconditional, conditional = torch.from_numpy(self.output).chunk(2)
        expected = unconditional + 7.5 * (conditional - unconditional)
        expected = module.rescale_noise_cfg(expected, conditional, rescale).numpy()
        # float32, numbers up to 40, some ten operations.
        np.testing.assert_allclose(Guidance(7.5, rescale)(self.output), expected, rtol=1e-5, atol=1e-5)

    def test_in_full_it_has_the_spread_of_the_conditional_prediction_image_by_image(self) -> None:
        found = Guidance(9.0, 1.0)(self.output)
        np.testing.assert_allclose(found.std(axis=(1, 2, 3)), self.output[3:].std(axis=(1, 2, 3)), rtol=1e-5)  # float32 sums

    def test_a_prediction_without_spread_stays(self) -> None:
        flat = np.ones((2, 4, 8, 8), np.float32)
        np.testing.assert_array_equal(Guidance(5.0, 0.7)(flat), flat[:1])

    def test_changes_the_picture_and_stays_in_float32(self, fakes: tuple[Pipeline, FakeSession]) -> None:
        pipe, _ = fakes
        plain, rescaled = (pipe(PROMPT, num_inference_steps=3, guidance_rescale=r).latents for r in (0.0, 0.7))
        assert plain.dtype == rescaled.dtype == np.float32
        assert not np.array_equal(plain, rescaled)


class TestInterval:
    def test_is_on_above_the_lower_level_up_to_the_upper_one(self) -> None:
        guidance = Guidance(5.0, interval=(0.5, 2.0))
        assert [guidance.is_on(Point(1.0, level, 0.0)) for level in (0.4, 0.5, 0.6, 2.0, 2.1)] == [False, False, True, True, False]
        assert not guidance.is_on(Point(0.0, 1.0, 999.0))
        assert Guidance(5.0).is_on(Point(0.0, 1.0, 999.0))

    def rows(self, pipe: Pipeline, network: FakeSession, **options: Any) -> list[int]:
        network.calls.clear()
        pipe([PROMPT, "cat"], num_inference_steps=10, **options)
        return [len(feeds["sample"]) for feeds in network.calls]

    def test_half_the_rows_are_run_where_guidance_is_off(self, fakes: tuple[Pipeline, FakeSession]) -> None:
        # Noise levels of Stable Diffusion at 901, 801, ... 1: 8.4 5.1 3.4 2.3 1.6 1.2 0.84 0.57 0.35 0.04.
        assert self.rows(*fakes, guidance_interval=(0.6, 3.0)) == [2] * 3 + [4] * 4 + [2] * 3
        assert self.rows(*fakes) == [4] * 10

    def test_the_rows_that_are_left_are_those_of_the_prompt(self, fakes: tuple[Pipeline, FakeSession]) -> None:
        pipe, network = fakes
        never = pipe(PROMPT, num_inference_steps=4, guidance_interval=(100, 200), negative_prompt="blue")
        alone = pipe(PROMPT, num_inference_steps=4, guidance_scale=1.0)
        assert never.latents.tobytes() == alone.latents.tobytes()
        assert {len(feeds["sample"]) for feeds in network.calls} == {1}

    def test_a_graph_for_one_number_of_rows_draws_the_same_with_all_of_them(self, tmp_path: Path) -> None:
        options: Any = {"num_inference_steps": 6, "guidance_interval": (0.6, 3.0)}
        free, _ = pipeline(tmp_path / "free")
        fixed, network = pipeline(tmp_path / "fixed", fixed_batch(2))
        assert fixed(PROMPT, **options).latents.tobytes() == free(PROMPT, **options).latents.tobytes()
        assert {len(feeds["sample"]) for feeds in network.calls} == {2}

    def test_observe_sees_the_rows_that_are_fed(self, fakes: tuple[Pipeline, FakeSession]) -> None:
        pipe, network = fakes
        seen: list[int] = []
        options: Any = {"num_inference_steps": 4, "guidance_interval": (0.6, 3.0)}
        pipe(PROMPT, observe=lambda step, feeds: seen.append(len(feeds["sample"])), **options)
        assert seen == [len(feeds["sample"]) for feeds in network.calls]
        assert set(seen) == {1, 2}

    def test_the_whole_range_is_plain_guidance(self, fakes: tuple[Pipeline, FakeSession]) -> None:
        pipe, _ = fakes
        assert pipe(PROMPT, guidance_interval=(0, math.inf)).latents.tobytes() == pipe(PROMPT).latents.tobytes()

    @pytest.mark.parametrize("cache", ["adaptive-diffusion:threshold=0", "adaptive-diffusion:threshold=0.5"])
    def test_a_cache_begins_anew_where_the_rows_change(self, fakes: tuple[Pipeline, FakeSession], cache: str) -> None:
        """At threshold 0 nothing is reused; at 0.5 much is, of the same rows only, so that the result has the right shape."""
        pipe, network = fakes
        options: Any = {"num_inference_steps": 10, "guidance_interval": (0.6, 3.0)}
        plain = pipe(PROMPT, **options).latents
        network.calls.clear()
        cached = pipe(PROMPT, cache=cache, **options).latents
        assert cached.shape == plain.shape
        if cache.endswith("=0"):
            assert cached.tobytes() == plain.tobytes()
        else:
            rows = [len(feeds["sample"]) for feeds in network.calls]
            assert len(rows) < 10
            assert {1, 2} == set(rows)

    def test_predictor_follows_it(self, fakes: tuple[Pipeline, FakeSession]) -> None:
        pipe, network = fakes
        pipe.predictor(PROMPT, num_inference_steps=4, guidance_interval=(100, 200))(TorchNoise(0).normal((1, 4, 8, 8)), 0)
        assert len(network.calls[0]["sample"]) == 1


class TestDynamicThreshold:
    @pytest.mark.parametrize("most", [1.0, 1.5, 100.0])
    def test_equals_diffusers(self, most: float) -> None:
        torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
        scheduler = diffusers.DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=most)
        x0 = TorchNoise(3).normal((3, 4, 8, 8)) * np.float32([0.3, 1, 2]).reshape(3, 1, 1, 1)
        expected = scheduler._threshold_sample(torch.from_numpy(x0)).numpy()
        # float32 quotients of numbers up to 1; torch interpolates the quantile in float32 as NumPy does.
        np.testing.assert_allclose(DynamicThreshold(0.9, most)(x0), expected, rtol=0, atol=1e-6)

    def test_leaves_small_values_alone_and_bounds_large_ones(self) -> None:
        small = 0.2 * TorchNoise(4).normal((1, 4, 8, 8))
        np.testing.assert_array_equal(DynamicThreshold(0.995)(small), np.clip(small, -1, 1))
        assert np.abs(DynamicThreshold(0.9)(20 * small)).max() == 1

    def test_bounds_what_the_network_says_in_every_step(self, fakes: tuple[Pipeline, FakeSession]) -> None:
        pipe, _ = fakes
        free, bound = (list(pipe.steps(PROMPT, num_inference_steps=5, dynamic_threshold=t)) for t in (None, (0.9,)))
        assert max(np.abs(step.denoised).max() for step in free) > 1
        assert {step.denoised.dtype for step in bound} == {np.dtype(np.float32)}
        assert max(np.abs(step.denoised).max() for step in bound) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": math.nan}, r"guidance scale.*Got: nan"),
        ({"guidance_rescale": 1.5}, r"rescaling.*Got: 1.5.*0 \(off\) to 1"),
        ({"guidance_rescale": math.nan}, r"rescaling.*Got: nan"),
        ({"guidance_interval": (3.0, 1.0)}, r"interval.*Got: 3, 1\..*lower one"),
        ({"guidance_interval": (1.0,)}, r"interval.*Got: 1\..*two levels"),
        ({"guidance_interval": ()}, r"interval.*Got: nothing"),
        ({"guidance_interval": (math.nan, 1.0)}, r"interval.*Got: nan, 1"),
        ({"dynamic_threshold": ()}, r"dynamic threshold.*Got: nothing"),
        ({"dynamic_threshold": (1.5,)}, r"dynamic threshold.*Got: 1.5.*quantile"),
        ({"dynamic_threshold": (0.9, 0.5)}, r"dynamic threshold.*Got: 0.9, 0.5"),
        ({"dynamic_threshold": (0.9, 1.0, 1.0)}, r"dynamic threshold.*Got: 0.9, 1, 1"),
    ],
)
def test_says_what_cannot_be_used(fakes: tuple[Pipeline, FakeSession], options: dict[str, Any], message: str) -> None:
    pipe, network = fakes
    with pytest.raises(ArgumentError, match=message):
        pipe(PROMPT, **options)
    assert not network.calls


def test_warns_of_guidance_that_has_nothing_to_do(fakes: tuple[Pipeline, FakeSession]) -> None:
    pipe, _ = fakes
    options: Any = {"guidance_rescale": 0.7, "guidance_interval": (0.5, 2.0), "num_inference_steps": 1}
    (text,) = pipe(PROMPT, guidance_scale=1.0, **options).warnings
    assert "guidance_rescale and guidance_interval without effect" in text
    assert pipe(PROMPT, **options).warnings == ()
