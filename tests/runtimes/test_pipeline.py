"""The loop around the engines: what is fed, what comes back, how it is stopped, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgediffusion.bundle import Bundle, Component, NoiseSchedule, Sampling, TensorSpec
from edgediffusion.errors import ArgumentError, BundleError, Cancelled, EdgeDiffusionError, UnknownName
from edgediffusion.runtimes import Pipeline, Request, Step
from edgediffusion.runtimes.denoiser import guidance_embedding, to_x0
from edgediffusion.runtimes.noise import TorchNoise
from edgediffusion.runtimes.request import Options
from edgediffusion.runtimes.schedules import Point, alpha_bars

from .tiny import DECODE, DENOISE, ENCODE, SAMPLING, TOKENS, WIDTH, FakeSession, Function, with_input, write_bundle

PROMPT = "a red shirt"


def encode(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.repeat(feeds["input_ids"][:, :, None].astype(np.float32) / 10, WIDTH, axis=2)


def predict(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    meant = feeds["encoder_hidden_states"].mean(axis=(1, 2)).reshape(-1, 1, 1, 1)
    return np.tanh(0.3 * feeds["sample"].astype(np.float32) + meant.astype(np.float32))


def decode(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    (latent,) = feeds.values()
    return np.repeat(np.repeat(latent[:, :3], 2, axis=2), 2, axis=3)


class Fakes:
    """A pipeline of Python functions, and the sessions that it calls."""

    def __init__(self, folder: Path, *, sampling: Sampling = SAMPLING, denoise: Component = DENOISE, function: Function = predict):
        components = (ENCODE, DENOISE, DECODE)
        self.bundle = replace(
            write_bundle(folder, sampling=sampling, components=components), components=(ENCODE, denoise, DECODE), sampling=sampling
        )
        self.encode = FakeSession.of(ENCODE, encode)
        self.denoise = FakeSession.of(denoise, function)
        self.decode = FakeSession.of(replace(DECODE, outputs=(TensorSpec("sample", "float32", ("batch", 3, "h2", "w2")),)), decode)
        self.pipe = Pipeline(self.bundle, {"text_encoder": self.encode, "unet": self.denoise, "vae_decoder": self.decode})


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    return Fakes(tmp_path / "bundle")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    pytest.importorskip("onnxruntime")
    return write_bundle(tmp_path_factory.mktemp("real") / "bundle")


class TestFeeds:
    def test_classifier_free_guidance_has_the_unconditional_rows_first(self, fakes: Fakes) -> None:
        fakes.pipe([PROMPT, "cat"], negative_prompt="blue", num_inference_steps=1)
        (feeds,) = fakes.denoise.calls
        ids = [int(v) for v in np.round(feeds["encoder_hidden_states"][:, 1, 0] * 10)]
        assert ids == [5, 5, 3, 9]  # blue, blue; "a", "cat": the first word after the start mark
        assert feeds["sample"].shape == (4, 4, 8, 8)
        np.testing.assert_array_equal(feeds["sample"][:2], feeds["sample"][2:])
        np.testing.assert_array_equal(feeds["sample"][:2], TorchNoise(0).normal((2, 4, 8, 8)))

    def test_guidance_goes_from_unconditional_past_conditional(self, fakes: Fakes) -> None:
        step = next(fakes.pipe.steps(PROMPT, num_inference_steps=1, guidance_scale=3.0, seed=4))
        (feeds,) = fakes.denoise.calls
        unconditional, conditional = np.split(predict(feeds), 2)
        assert step.timestep == 1  # leading spacing, one step, offset 1
        bar = alpha_bars(SAMPLING.schedule)[1]
        expected = (feeds["sample"][:1] - math.sqrt(1 - bar) * (unconditional + 3.0 * (conditional - unconditional))) / math.sqrt(bar)
        np.testing.assert_allclose(step.denoised, expected, rtol=0, atol=2e-6)  # float32, numbers up to 4, five operations

    @pytest.mark.parametrize("scale", [0.0, 1.0])
    def test_the_unconditional_half_is_left_out_where_it_has_no_effect(self, fakes: Fakes, scale: float) -> None:
        fakes.pipe(PROMPT, num_inference_steps=2, guidance_scale=scale)
        assert [feeds["sample"].shape[0] for feeds in fakes.denoise.calls] == [1, 1]
        assert len(fakes.encode.calls) == 1

    def test_embedded_guidance_is_a_condition(self, tmp_path: Path) -> None:
        sampling = replace(SAMPLING, guidance="embedded", guidance_width=32, sampler="lcm")
        denoise = with_input(DENOISE, TensorSpec("timestep_cond", "float32", ("batch", 32)))
        fakes = Fakes(tmp_path / "bundle", sampling=sampling, denoise=denoise)
        fakes.pipe([PROMPT, "cat"], num_inference_steps=2, guidance_scale=8.5)
        for feeds in fakes.denoise.calls:
            assert feeds["sample"].shape[0] == 2
            np.testing.assert_array_equal(feeds["timestep_cond"], np.tile(guidance_embedding(7.5, 32), (2, 1)))

    def test_without_guidance_there_is_one_row_an_image(self, tmp_path: Path) -> None:
        fakes = Fakes(tmp_path / "bundle", sampling=replace(SAMPLING, guidance="none"))
        result = fakes.pipe(PROMPT, num_inference_steps=1, guidance_scale=5.0)
        assert fakes.denoise.calls[0]["sample"].shape[0] == 1
        assert any("guidance_scale has no effect" in text for text in result.warnings)

    @pytest.mark.parametrize(
        ("dtype", "shape", "expected"),
        [
            ("float32", (), 499.5),
            ("int64", (), 500),
            ("float32", ("batch",), 499.5),
            ("float16", ("batch",), 499.5),
            ("int64", ("batch",), 500),
        ],
    )
    def test_the_timestep_has_the_shape_and_type_that_the_graph_wants(
        self, tmp_path: Path, dtype: str, shape: tuple[str, ...], expected: float
    ) -> None:
        denoise = with_input(DENOISE, TensorSpec("timestep", dtype, shape))
        sampling = replace(SAMPLING, schedule=replace(SAMPLING.schedule, spacing="linspace"))
        fakes = Fakes(tmp_path / "bundle", denoise=denoise, sampling=sampling)
        fakes.pipe([PROMPT, PROMPT], num_inference_steps=3, sampler="euler")
        fed = fakes.denoise.calls[1]["timestep"]
        assert fed.dtype == dtype
        assert fed.shape == ((4,) if shape else ())
        assert set(fed.ravel().tolist()) == {expected}

    def test_a_float16_network_is_fed_halves_and_its_noise_is_rounded(self, tmp_path: Path) -> None:
        halves = replace(
            DENOISE,
            inputs=tuple(replace(s, dtype="float16") for s in DENOISE.inputs),
            outputs=(replace(DENOISE.outputs[0], dtype="float16"),),
        )
        fakes = Fakes(tmp_path / "bundle", denoise=halves)
        result = fakes.pipe(PROMPT, num_inference_steps=2, seed=9)
        feeds = fakes.denoise.calls[0]
        assert {array.dtype for array in feeds.values()} == {np.dtype(np.float16)}
        np.testing.assert_array_equal(feeds["sample"][0], TorchNoise(9, "float16").normal((1, 4, 8, 8))[0])
        assert result.latents.dtype == result.pixels.dtype == np.float32

    def test_observe_gets_the_very_bits_that_are_fed(self, fakes: Fakes) -> None:
        seen: list[tuple[int, Mapping[str, np.ndarray]]] = []
        fakes.pipe(PROMPT, num_inference_steps=3, observe=lambda step, feeds: seen.append((step, feeds)))
        assert [step for step, _ in seen] == [0, 1, 2]
        for (_, found), fed in zip(seen, fakes.denoise.calls, strict=True):
            assert {n: (a.dtype, a.tobytes()) for n, a in found.items()} == {n: (a.dtype, a.tobytes()) for n, a in fed.items()}

    def test_a_text_is_encoded_once(self, fakes: Fakes) -> None:
        fakes.pipe([PROMPT, PROMPT], num_inference_steps=1, num_images=2)
        fakes.pipe(PROMPT, num_inference_steps=1)
        assert len(fakes.encode.calls) == 2  # the prompt, and the empty negative one
        assert all(feeds["input_ids"].shape == (1, TOKENS) for feeds in fakes.encode.calls)

    def test_buffers_are_bound_once_per_shape(self, fakes: Fakes) -> None:
        for size in (16, 16, 24, 16):
            fakes.pipe(PROMPT, num_inference_steps=2, height=size)
        assert [axes["height"] for axes in fakes.denoise.bound] == [8, 12]
        assert len(fakes.decode.bound) == 2


class TestResult:
    def test_latents_are_scaled_and_shifted_for_the_decoder(self, fakes: Fakes) -> None:
        result = fakes.pipe(PROMPT, num_inference_steps=2)
        (feeds,) = fakes.decode.calls
        np.testing.assert_allclose(feeds["latent_sample"], result.latents / 0.5 + 0.1, rtol=1e-6)  # float32, two operations
        expected = np.clip(decode(feeds).transpose(0, 2, 3, 1) / 2 + 0.5, 0, 1)
        np.testing.assert_allclose(result.pixels, expected, atol=1e-6)  # float32, two operations

    def test_pictures_are_rgb_of_the_size_asked_for(self, fakes: Fakes) -> None:
        result = fakes.pipe(PROMPT, num_inference_steps=1, height=24, width=32, num_images=2)
        assert [(image.size, image.mode) for image in result.images] == [((32, 24), "RGB")] * 2
        np.testing.assert_array_equal(np.asarray(result.images[1]), (result.pixels[1] * 255).round().astype(np.uint8))

    def test_one_channel_makes_grey_pictures(self, real: Bundle, tmp_path: Path) -> None:
        grey = replace(DECODE, outputs=(replace(DECODE.outputs[0], shape=("batch", 1, "image_height", "image_width")),))
        bundle = write_bundle(tmp_path / "grey", components=(ENCODE, DENOISE, grey))
        (image,) = Pipeline.from_bundle(bundle, threads=1)(PROMPT, num_inference_steps=1).images
        assert (image.mode, image.size) == ("L", (16, 16))

    def test_says_how_long_each_part_took_and_which_seeds(self, fakes: Fakes) -> None:
        result = fakes.pipe([PROMPT, "cat"], num_inference_steps=3, seed=[5, 6])
        timings = result.timings
        assert result.seeds == (5, 6)
        assert len(timings.step_ms) == 3
        assert timings.total_ms == timings.encode_ms + sum(timings.step_ms) + timings.decode_ms > 0

    def test_warns_of_a_prompt_that_was_cut(self, fakes: Fakes) -> None:
        result = fakes.pipe(["a very very very big red big dog of a cat"], num_inference_steps=1)
        assert result.warnings == ("The prompt is too long; this part of it was left out: 'big dog of a cat'",)
        assert fakes.pipe(PROMPT, num_inference_steps=1).warnings == ()

    def test_warns_of_a_negative_prompt_without_effect(self, fakes: Fakes) -> None:
        (text,) = fakes.pipe(PROMPT, negative_prompt="blue", guidance_scale=1.0, num_inference_steps=1).warnings
        assert "no effect at guidance_scale 1" in text

    def test_images_of_a_prompt_stand_together(self, fakes: Fakes) -> None:
        fakes.pipe([PROMPT, "cat"], num_inference_steps=1, num_images=2, guidance_scale=1.0)
        ids = np.round(fakes.denoise.calls[0]["encoder_hidden_states"][:, 1, 0] * 10)
        assert ids.tolist() == [3, 3, 9, 9]

    def test_latents_replace_the_noise(self, fakes: Fakes) -> None:
        latents = TorchNoise(7).normal((1, 4, 8, 8))
        given = fakes.pipe(PROMPT, num_inference_steps=2, latents=latents)
        drawn = fakes.pipe(PROMPT, num_inference_steps=2, seed=7)
        assert given.pixels.tobytes() == drawn.pixels.tobytes()


class TestSeeds:
    @pytest.mark.parametrize("sampler", ["ddim", "euler-ancestral", "lcm"])
    def test_same_seed_same_bits(self, real: Bundle, sampler: str) -> None:
        pictures = set()
        for _ in range(2):
            pipe = Pipeline.from_bundle(real, threads=2)
            for _ in range(2):
                pictures.add(pipe(PROMPT, num_inference_steps=4, seed=11, sampler=sampler).pixels.tobytes())
        assert len(pictures) == 1

    def test_other_seed_other_picture(self, real: Bundle) -> None:
        pipe = Pipeline.from_bundle(real, threads=1)
        assert not np.array_equal(pipe(PROMPT, seed=1).pixels, pipe(PROMPT, seed=2).pixels)

    def test_an_image_of_a_list_of_seeds_is_the_image_of_its_seed(self, fakes: Fakes) -> None:
        both = fakes.pipe([PROMPT, "cat"], seed=[3, 4], sampler="euler-ancestral")
        alone = fakes.pipe("cat", seed=4, sampler="euler-ancestral")
        assert both.pixels[1].tobytes() == alone.pixels[0].tobytes()


class TestSteps:
    def test_yields_each_step(self, fakes: Fakes) -> None:
        steps = list(fakes.pipe.steps(PROMPT, num_inference_steps=4))
        assert [(s.index, s.total, s.timestep) for s in steps] == [(0, 4, 751), (1, 4, 501), (2, 4, 251), (3, 4, 1)]
        result = fakes.pipe(PROMPT, num_inference_steps=4)
        assert steps[-1].latents.tobytes() == result.latents.tobytes()
        np.testing.assert_array_equal(fakes.pipe.decode(steps[-1].latents), result.pixels)

    def test_runs_the_network_only_when_asked_for_the_next_step(self, fakes: Fakes) -> None:
        for step in fakes.pipe.steps(PROMPT, num_inference_steps=10):
            if step.index == 2:
                break
        assert len(fakes.denoise.calls) == 3

    def test_refuses_before_the_first_step_is_taken(self, fakes: Fakes) -> None:
        with pytest.raises(UnknownName):
            fakes.pipe.steps(PROMPT, sampler="nobody")

    def test_two_loops_at_once_do_not_disturb_each_other(self, fakes: Fakes) -> None:
        alone = [[s.latents.tobytes() for s in fakes.pipe.steps(p, num_inference_steps=3)] for p in (PROMPT, "cat")]
        together = zip(*(fakes.pipe.steps(p, num_inference_steps=3) for p in (PROMPT, "cat")), strict=True)
        assert [list(states) for states in zip(*([s.latents.tobytes() for s in pair] for pair in together), strict=True)] == alone

    def test_preview_shows_what_the_network_makes_of_it(self, fakes: Fakes) -> None:
        step = next(fakes.pipe.steps([PROMPT, "cat"], num_inference_steps=4))
        assert [image.size for image in step.preview()] == [(16, 16)] * 2
        np.testing.assert_allclose(fakes.decode.calls[0]["latent_sample"][0], step.denoised[0] / 0.5 + 0.1, rtol=1e-6)  # float32


class TestCallback:
    def test_is_called_after_every_step(self, fakes: Fakes) -> None:
        seen: list[Step] = []
        fakes.pipe(PROMPT, num_inference_steps=3, callback=seen.append)
        assert [step.index for step in seen] == [0, 1, 2]

    def test_false_cancels(self, fakes: Fakes) -> None:
        with pytest.raises(Cancelled, match="Stopped after step 2 of 5"):
            fakes.pipe(PROMPT, num_inference_steps=5, callback=lambda step: step.index < 1)
        assert len(fakes.denoise.calls) == 2
        assert not fakes.decode.calls

    def test_raising_cancels_and_leaves_the_pipeline_usable(self, fakes: Fakes) -> None:
        def stop(step: Step) -> None:
            raise Cancelled("Enough")

        before = fakes.pipe(PROMPT, num_inference_steps=3).pixels.tobytes()
        with pytest.raises(Cancelled, match="Enough"):
            fakes.pipe(PROMPT, num_inference_steps=3, callback=stop)
        assert fakes.pipe(PROMPT, num_inference_steps=3).pixels.tobytes() == before


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"sampler": "dimm"}, r"No sampler is called 'dimm'.*ddim.*Did you mean 'ddim'"),
            ({"height": 18}, r"size.*Got: 18 x 16.*multiples of 4.*nearest is 16 x 16"),
            ({"width": 0}, r"Got: 16 x 0.*nearest is 16 x 4"),
            ({"height": -4}, r"Got: -4 x 16"),
            ({"num_inference_steps": 0}, r"number of steps.*Got: 0.*1 to 1000"),
            ({"sampler": "lcm", "num_inference_steps": 51}, r"'lcm'.*Got: 51.*1 to 50"),
            ({"sampler": "flow-euler"}, r"'flow-euler'.*'scaled_linear'.*ddim.*euler"),
            ({"num_images": 0}, r"images per prompt.*Got: 0"),
            ({"seed": [1, 2]}, r"2 seeds for 1 images"),
            ({"noise": "white"}, r"No noise is called 'white'.*philox, torch"),
            ({"negative_prompt": ["a", "b"]}, r"2 for 1 prompts"),
            ({"latents": np.zeros((1, 4, 4, 4))}, r"latents.*\(1, 4, 4, 4\).*\(1, 4, 8, 8\)"),
        ],
    )
    def test_says_what_is_wrong_and_what_is_allowed(self, fakes: Fakes, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ArgumentError, match=message):
            fakes.pipe(PROMPT, **options)
        assert not fakes.denoise.calls

    def test_no_prompt_at_all(self, fakes: Fakes) -> None:
        with pytest.raises(ArgumentError, match="empty"):
            fakes.pipe([])

    def test_a_misspelt_option(self, fakes: Fakes) -> None:
        with pytest.raises(TypeError, match="guidance"):
            fakes.pipe(PROMPT, guidance=3.0)  # type: ignore[call-arg]

    def test_another_size_than_the_only_one(self, tmp_path: Path) -> None:
        fakes = Fakes(tmp_path / "bundle", sampling=replace(SAMPLING, fixed_size=True))
        fakes.pipe(PROMPT, height=16, width=16, num_inference_steps=1)
        with pytest.raises(ArgumentError, match=r"one size only.*Got: 24 x 16.*Allowed: 16 x 16"):
            fakes.pipe(PROMPT, height=24)

    def test_predicting_noise_from_nothing_but_noise(self, tmp_path: Path) -> None:
        schedule = replace(SAMPLING.schedule, zero_terminal_snr=True, spacing="trailing")
        fakes = Fakes(tmp_path / "bundle", sampling=replace(SAMPLING, schedule=schedule))
        with pytest.raises(ArgumentError, match=r"'ddim' starts from pure noise.*Allowed: euler"):
            fakes.pipe(PROMPT)
        assert np.isfinite(fakes.pipe(PROMPT, sampler="euler").latents).all()

    def test_a_condition_that_nobody_gives(self, tmp_path: Path) -> None:
        fakes = Fakes(tmp_path / "bundle", denoise=with_input(DENOISE, TensorSpec("text_embeds", "float32", ("batch", 5))))
        with pytest.raises(BundleError, match=r"'unet'.*Got: text_embeds.*Allowed: encoder_hidden_states"):
            fakes.pipe(PROMPT)

    def test_a_condition_that_two_encoders_give(self, fakes: Fakes) -> None:
        second = replace(ENCODE, name="text_encoder_2")
        bundle = replace(fakes.bundle, components=(*fakes.bundle.components, second))
        sessions = {"text_encoder": fakes.encode, "text_encoder_2": fakes.encode, "unet": fakes.denoise, "vae_decoder": fakes.decode}
        with pytest.raises(BundleError, match=r"Several encoders.*Got: encoder_hidden_states of 6 . 6 numbers. Allowed: 6"):
            Pipeline(bundle, sessions)

    def test_a_bundle_that_cannot_draw(self, tmp_path: Path) -> None:
        bundle = write_bundle(tmp_path / "bundle", sampling=None, components=(DECODE,))
        with pytest.raises(BundleError, match=r"cannot draw.*Got: vae_decoder \(decode\)"):
            Pipeline.from_bundle(bundle)

    def test_a_folder_that_is_no_bundle(self, tmp_path: Path) -> None:
        with pytest.raises(BundleError, match="not a bundle"):
            Pipeline.from_bundle(tmp_path)


def test_two_encoders_give_two_conditions(fakes: Fakes) -> None:
    second = replace(ENCODE, name="text_encoder_2", feeds={"last_hidden_state": "encoder_hidden_states_2"})
    denoise = with_input(DENOISE, TensorSpec("encoder_hidden_states_2", "float32", ("batch", TOKENS, WIDTH)))
    bundle = replace(fakes.bundle, components=(ENCODE, second, denoise, DECODE))
    network = FakeSession.of(denoise, predict)
    other = FakeSession.of(ENCODE, lambda feeds: encode(feeds) + 1)
    pipe = Pipeline(bundle, {"text_encoder": fakes.encode, "text_encoder_2": other, "unet": network, "vae_decoder": fakes.decode})
    pipe(PROMPT, num_inference_steps=1)
    (feeds,) = network.calls
    np.testing.assert_array_equal(feeds["encoder_hidden_states"] + 1, feeds["encoder_hidden_states_2"])


def test_two_encoders_may_share_the_name_of_an_output_that_nobody_takes(fakes: Fakes) -> None:
    second = replace(ENCODE, name="text_encoder_2", feeds={"last_hidden_state": "unused"})
    first = replace(ENCODE, outputs=(*ENCODE.outputs, TensorSpec("unused", "float32", ("batch", 3))))
    bundle = replace(fakes.bundle, components=(first, second, DENOISE, DECODE))
    sessions = {"text_encoder": fakes.encode, "text_encoder_2": fakes.encode, "unet": fakes.denoise, "vae_decoder": fakes.decode}
    Pipeline(bundle, {**sessions, "text_encoder": FakeSession.of(first, encode)})


def test_a_bundle_without_text_or_decoder_draws_pixels(tmp_path: Path) -> None:
    denoise = replace(DENOISE, inputs=DENOISE.inputs[:2])
    sampling = replace(SAMPLING, guidance="none", downsampling=1, latent_channels=4, latent_scale=1.0, latent_shift=0.0)
    bundle = replace(write_bundle(tmp_path / "bundle", sampling=sampling), components=(denoise,))
    pipe = Pipeline(bundle, {"unet": FakeSession.of(denoise, lambda feeds: np.tanh(feeds["sample"]))})
    result = pipe("", num_inference_steps=2, num_images=2)
    assert result.pixels.shape == (2, 16, 16, 4)


def test_a_flow_draws(tmp_path: Path) -> None:
    sampling = replace(SAMPLING, prediction="flow", schedule=NoiseSchedule("flow", 1000, shift=3.0), sampler="flow-euler")
    fakes = Fakes(tmp_path / "bundle", sampling=sampling)
    steps = list(fakes.pipe.steps(PROMPT, num_inference_steps=3))
    assert steps[0].timestep == 1000
    assert fakes.denoise.calls[0]["timestep"] == 1000


def test_golden_guidance_embedding() -> None:
    embedding = guidance_embedding(7.5, 256)
    assert embedding.shape == (256,)
    # Angles of 4096 to 8192 have 4.9e-4 between two float32 numbers, and the published ones may be rounded the other way.
    np.testing.assert_allclose(embedding[:4], [-0.8512359, 0.84222814, 0.01181966, 0.99238252], atol=5e-4)
    assert float((embedding**2).sum()) == pytest.approx(128, abs=1e-4)  # sin^2 + cos^2, 128 times, in float32
    assert guidance_embedding(1.0, 7)[-1] == 0


@pytest.mark.parametrize("w", [0.0, 0.5, 6.5, 7.5, 14.0])
def test_guidance_embedding_equals_diffusers(w: float) -> None:
    torch = pytest.importorskip("torch")
    pipelines = pytest.importorskip("diffusers")
    theirs = pipelines.LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, torch.tensor([w]), embedding_dim=256)
    # torch's vectorized exp may round a frequency the other way, which is worth one unit in the last place of the angle.
    np.testing.assert_allclose(guidance_embedding(w, 256), theirs[0].numpy(), rtol=0, atol=1e-6 + np.spacing(np.float32(1000 * w)))


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample", "flow"])
def test_every_prediction_tells_the_same_x0(prediction: str) -> None:
    x0, noise = TorchNoise(1).normal((1, 4, 8, 8)), TorchNoise(2).normal((1, 4, 8, 8))
    alpha, sigma = (0.4, 0.6) if prediction == "flow" else (0.6, 0.8)
    output = {"epsilon": noise, "v": alpha * noise - sigma * x0, "sample": x0, "flow": noise - x0}[prediction]
    found = to_x0(prediction, alpha * x0 + sigma * noise, output, Point(alpha, sigma, 0.0))
    np.testing.assert_allclose(found, x0, rtol=0, atol=2e-6)  # float32, numbers up to 4, three operations


def test_options_are_the_fields_of_a_request() -> None:
    assert set(Options.__annotations__) == {field.name for field in fields(Request)} - {"prompt"}


def test_every_error_is_one_of_ours(fakes: Fakes) -> None:
    for options in ({"height": 17}, {"sampler": "x"}, {"num_inference_steps": -3}):
        with pytest.raises(EdgeDiffusionError):
            fakes.pipe(PROMPT, **options)  # type: ignore[arg-type]
