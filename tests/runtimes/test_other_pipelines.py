"""Pipelines without text: classes, nothing at all, and bare loops; and what stops a loop."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgediffusion.bundle import Component, NoiseSchedule, TensorSpec
from edgediffusion.errors import ArgumentError, BundleError, Cancelled, EngineError
from edgediffusion.runtimes import Pipeline
from edgediffusion.runtimes.graph import Graph
from edgediffusion.runtimes.noise import TorchNoise

from .test_pipeline import PROMPT, Fakes, predict
from .tiny import DENOISE, SAMPLING, FakeSession, Function, with_input, write_bundle

LABELS = TensorSpec("class_labels", "int64", ("batch",))


def pipeline(folder: Path, denoise: Component, function: Function, **facts: Any) -> tuple[Pipeline, FakeSession]:
    """Without encoders and decoder: latents are pixels."""
    plain = {"downsampling": 1, "latent_scale": 1.0, "latent_shift": 0.0, "guidance": "none", **facts}
    bundle = replace(write_bundle(folder), components=(denoise,), sampling=replace(SAMPLING, **plain))
    session = FakeSession.of(denoise, function)
    return Pipeline(bundle, {"unet": session}), session


class TestClasses:
    @pytest.fixture
    def made(self, tmp_path: Path) -> tuple[Pipeline, FakeSession]:
        denoise = with_input(replace(DENOISE, inputs=DENOISE.inputs[:2]), LABELS)
        function = lambda feeds: np.tanh(feeds["sample"] + 0.1 * feeds["class_labels"].reshape(-1, 1, 1, 1))  # noqa: E731
        return pipeline(tmp_path / "bundle", denoise, function, guidance="classifier-free", classes=10)

    def test_the_unconditional_rows_are_of_no_class(self, made: tuple[Pipeline, FakeSession]) -> None:
        pipe, session = made
        result = pipe(class_labels=[3, 7], num_images=2, num_inference_steps=1, guidance_scale=4.0)
        assert session.calls[0]["class_labels"].tolist() == [10, 10, 10, 10, 3, 3, 7, 7]
        assert result.pixels.shape[0] == 4
        assert result.warnings == ()

    def test_one_class_is_for_all_images(self, made: tuple[Pipeline, FakeSession]) -> None:
        pipe, session = made
        pipe(class_labels=9, num_images=3, num_inference_steps=1, guidance_scale=1.0)
        assert session.calls[0]["class_labels"].tolist() == [9, 9, 9]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "draws one class or another.*class_labels"),
            ({"class_labels": 10}, "no such class. Got: 10. Allowed: 0 to 9"),
            ({"class_labels": [0, -1]}, "Got: -1"),
            ({"prompt": ["", ""], "class_labels": [1, 2, 3]}, "one per prompt. Got: 3 for 2"),
        ],
    )
    def test_refuses(self, made: tuple[Pipeline, FakeSession], options: dict[str, Any], message: str) -> None:
        with pytest.raises(ArgumentError, match=message):
            made[0](**options)

    def test_a_bundle_that_does_not_say_which_label_is_none(self, made: tuple[Pipeline, FakeSession]) -> None:
        pipe, session = made
        silent = Pipeline(replace(pipe.bundle, sampling=replace(pipe.sampling, classes=None)), {"unet": session})
        silent(class_labels=99, guidance_scale=1.0, num_inference_steps=1)
        with pytest.raises(BundleError, match="which label stands for no class.*guidance_scale to 1"):
            silent(class_labels=3, guidance_scale=2.0)

    def test_equals_diffusers(self, tmp_path: Path) -> None:
        torch = pytest.importorskip("torch")
        diffusers = pytest.importorskip("diffusers")
        from . import twins

        torch.manual_seed(0)
        network = diffusers.DiTTransformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
            num_embeds_ada_norm=1000,
        ).eval()
        pipe = diffusers.DiTPipeline(network, twins.vae(), diffusers.DDIMScheduler(clip_sample=False))
        pipe.set_progress_bar_config(disable=True)
        decode, latents = pipe.vae.decode, []
        pipe.vae.decode = lambda given: (latents.append(given * pipe.vae.config.scaling_factor), decode(given))[1]
        pipe(class_labels=[3, 7], guidance_scale=4.0, generator=torch.Generator().manual_seed(5), num_inference_steps=4)

        def call(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
            with torch.no_grad():
                given = {name: torch.from_numpy(array) for name, array in feeds.items()}
                found = network(given["sample"], timestep=given["timestep"].long(), class_labels=given["class_labels"]).sample
            return np.asarray(found[:, :4])  # its second half is a variance that DDIM does not use

        timestep = TensorSpec("timestep", "int64", ("batch",))
        denoise = with_input(replace(DENOISE, inputs=DENOISE.inputs[:2]), timestep, LABELS)
        schedule = NoiseSchedule("linear", 1000, 0.0001, 0.02)
        ours, _ = pipeline(
            tmp_path / "bundle", denoise, call, guidance="classifier-free", classes=1000, schedule=schedule, height=8, width=8
        )
        result = ours(class_labels=[3, 7], guidance_scale=4.0, seed=5, num_inference_steps=4)
        # the same float32 network on states that differ by rounding, amplified by guidance
        np.testing.assert_allclose(result.latents, latents[0].numpy(), rtol=0, atol=1e-4)


class TestNothing:
    @pytest.fixture
    def made(self, tmp_path: Path) -> tuple[Pipeline, FakeSession]:
        return pipeline(tmp_path / "bundle", replace(DENOISE, inputs=DENOISE.inputs[:2]), lambda feeds: np.tanh(feeds["sample"]))

    def test_needs_no_prompt(self, made: tuple[Pipeline, FakeSession]) -> None:
        assert made[0](num_images=2, num_inference_steps=2).pixels.shape == (2, 16, 16, 4)

    def test_says_that_texts_and_classes_have_no_effect(self, made: tuple[Pipeline, FakeSession]) -> None:
        warnings = made[0](PROMPT, class_labels=3, num_inference_steps=1).warnings
        assert [text.split(" has")[0].split(" have")[0] for text in warnings] == ["The prompt", "class_labels"]

    def test_starts_from_a_picture_in_pixels(self, made: tuple[Pipeline, FakeSession]) -> None:
        image = np.random.default_rng(0).random((16, 16, 4))
        found = made[0](image=image, strength=0.02, num_inference_steps=50)
        np.testing.assert_allclose(found.pixels[0], image, atol=0.3)

    def test_equals_diffusers(self, tmp_path: Path) -> None:
        torch = pytest.importorskip("torch")
        diffusers = pytest.importorskip("diffusers")
        torch.manual_seed(0)
        network = diffusers.UNet2DModel(
            sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False,
        ).eval()  # fmt: skip
        pipe = diffusers.DDIMPipeline(unet=network, scheduler=diffusers.DDIMScheduler(clip_sample=False))
        pipe.set_progress_bar_config(disable=True)
        theirs = pipe(batch_size=2, generator=torch.Generator().manual_seed(5), num_inference_steps=4, output_type="np").images

        def call(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
            with torch.no_grad():
                return np.asarray(network(*(torch.from_numpy(feeds[name]) for name in ("sample", "timestep"))).sample)

        pixels = ("batch", 3, "height", "width")
        denoise = replace(
            DENOISE,
            inputs=(TensorSpec("sample", "float32", pixels), TensorSpec("timestep", "int64", ())),
            outputs=(TensorSpec("out_sample", "float32", pixels),),
        )
        schedule = NoiseSchedule("linear", 1000, 0.0001, 0.02)
        ours, _ = pipeline(tmp_path / "bundle", denoise, call, latent_channels=3, schedule=schedule)
        np.testing.assert_allclose(ours(num_images=2, seed=5, num_inference_steps=4).pixels, theirs, rtol=0, atol=1e-4)  # as above


class TestBareLoop:
    """A policy: actions [rows, horizon, action], denoised under an observation."""

    POLICY = Component(
        "unet",
        "denoise",
        "unet/model.onnx",
        (
            TensorSpec("sample", "float32", ("batch", "horizon", 2)),
            TensorSpec("timestep", "float32", ()),
            TensorSpec("state", "float32", ("batch", 5)),
        ),
        (TensorSpec("out_sample", "float32", ("batch", "horizon", 2)),),
    )

    @staticmethod
    def act(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.tanh(feeds["sample"] + feeds["state"].mean(axis=1).reshape(-1, 1, 1))

    @pytest.fixture
    def made(self, tmp_path: Path) -> tuple[Pipeline, FakeSession]:
        return pipeline(tmp_path / "bundle", self.POLICY, self.act)

    def test_is_the_same_loop(self, made: tuple[Pipeline, FakeSession], tmp_path: Path) -> None:
        """The bits of a pipeline that draws, for a network that looks at single numbers."""
        pipe, _ = made
        noise = TorchNoise(7).normal((2, 4, 16, 16))
        found = pipe.denoise(noise.reshape(2, 512, 2), {"state": np.zeros((2, 5))}, num_inference_steps=4)
        draws, _ = pipeline(tmp_path / "other", replace(DENOISE, inputs=DENOISE.inputs[:2]), lambda feeds: np.tanh(feeds["sample"]))
        assert found.tobytes() == draws(num_images=2, seed=7, num_inference_steps=4).latents.tobytes()

    def test_conditions_are_fed_by_name(self, made: tuple[Pipeline, FakeSession]) -> None:
        pipe, session = made
        state = np.arange(10, dtype=np.float32).reshape(2, 5)
        found = pipe.denoise(np.zeros((2, 7, 2), np.float32), {"state": state}, num_inference_steps=3, sampler="euler")
        assert found.shape == (2, 7, 2)
        assert [feeds["state"].tolist() for feeds in session.calls] == [state.tolist()] * 3

    def test_guidance_leads_away_from_other_conditions(self, tmp_path: Path) -> None:
        pipe, session = pipeline(tmp_path / "bundle", self.POLICY, self.act, guidance="classifier-free")
        sample, state, none = np.ones((1, 4, 2), np.float32), np.ones((1, 5), np.float32), np.zeros((1, 5), np.float32)
        guided = pipe.denoise(sample, {"state": state}, unconditional={"state": none}, num_inference_steps=1, guidance_scale=3.0)
        assert session.calls[0]["state"].mean(axis=1).tolist() == [0, 1]
        plain = pipe.denoise(sample, {"state": state}, num_inference_steps=1)
        assert session.calls[1]["sample"].shape[0] == 1
        assert not np.array_equal(guided, plain)
        with pytest.raises(ArgumentError, match="Guidance needs the conditions that it leads away from"):
            pipe.denoise(sample, {"state": state}, guidance_scale=3.0)

    def test_is_stopped_by_its_callback(self, made: tuple[Pipeline, FakeSession]) -> None:
        with pytest.raises(Cancelled):
            made[0].denoise(np.zeros((1, 3, 2)), {"state": np.zeros((1, 5))}, callback=lambda step: False)

    @pytest.mark.parametrize(
        ("conditions", "options", "message"),
        [
            ({}, {}, "'unet' takes. Got: none. Allowed: state"),
            ({"state": np.zeros((1, 5)), "goal": np.zeros(3)}, {}, "Got: goal, state. Allowed: state"),
            ({"state": np.zeros((2, 5))}, {}, r"'state' has a row for each row.* Got: \(2, 5\). Allowed: 1 rows"),
            ({"state": np.zeros((1, 6))}, {}, r"'state' of 'unet' is fixed. Got: \(1, 6\)"),
            ({"state": np.zeros((1, 5))}, {"height": 8, "image": 3}, "no meaning for a bare loop. Got: height, image"),
        ],
    )
    def test_refuses(self, made: tuple[Pipeline, FakeSession], conditions: Any, options: Any, message: str) -> None:
        with pytest.raises(ArgumentError, match=message):
            made[0].denoise(np.zeros((1, 3, 2)), conditions, **options)


class TestBothRowsApart:
    @pytest.mark.parametrize("interval", [None, (0.5, 2.0)])
    def test_makes_the_same_bits_in_calls_of_half_the_rows(self, tmp_path: Path, interval: tuple[float, float] | None) -> None:
        fakes = Fakes(tmp_path / "bundle")
        asked = {"num_inference_steps": 6, "guidance_interval": interval}
        joint = fakes.pipe([PROMPT, "cat"], **asked).pixels
        fakes.denoise.calls.clear()
        apart = fakes.pipe([PROMPT, "cat"], guidance_batch="separate", **asked).pixels
        assert apart.tobytes() == joint.tobytes()
        assert {feeds["sample"].shape[0] for feeds in fakes.denoise.calls} == {2}
        assert len(fakes.denoise.calls) == 12 if interval is None else 6 < len(fakes.denoise.calls) < 12

    def test_another_name_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ArgumentError, match="'auto'.*joint, separate"):
            Fakes(tmp_path / "bundle").pipe(PROMPT, guidance_batch="auto")


class TestNumbersThatAreNotFinite:
    def test_of_the_network_stop_the_loop(self, tmp_path: Path) -> None:
        def breaks(feeds: Mapping[str, np.ndarray]) -> np.ndarray:
            return predict(feeds) * (np.nan if feeds["timestep"] < 400 else 1)

        fakes = Fakes(tmp_path / "bundle", function=breaks)
        with pytest.raises(EngineError, match="'unet' returned numbers that are not finite in step 3 of 4, at time step 251"):
            fakes.pipe(PROMPT, num_inference_steps=4)
        assert len(fakes.denoise.calls) == 3

    def test_of_the_decoder_make_no_picture(self, tmp_path: Path) -> None:
        fakes = Fakes(tmp_path / "bundle")
        fakes.decode.function = lambda feeds: np.full((1, 3, 16, 16), np.inf)
        with pytest.raises(EngineError, match="'vae_decoder' returned numbers that are not finite. Got: 768 of 768"):
            fakes.pipe(PROMPT, num_inference_steps=1)

    def test_of_an_encoder_are_not_kept(self, tmp_path: Path) -> None:
        fakes = Fakes(tmp_path / "bundle")
        good = fakes.encode.function
        fakes.encode.function = lambda feeds: good(feeds) * np.nan
        for _ in range(2):
            with pytest.raises(EngineError, match="'text_encoder' returned numbers"):
                fakes.pipe(PROMPT, num_inference_steps=1)
        fakes.encode.function = good
        assert np.isfinite(fakes.pipe(PROMPT, num_inference_steps=1).pixels).all()


def test_fifty_pictures_leave_nothing_behind(tmp_path: Path) -> None:
    """What Python holds after the tenth picture and after the sixtieth, of different texts and seeds."""
    pytest.importorskip("onnxruntime")
    pipe = Pipeline.from_bundle(write_bundle(tmp_path / "bundle"), threads=1)
    tracemalloc.start()
    try:
        held = []
        for i in range(60):
            pipe(PROMPT, num_inference_steps=2, seed=i)
            if i in (9, 59):
                gc.collect()
                held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    # A picture that stayed would be 1 kB of latents and more. ONNX Runtime 1.31 keeps some 150 bytes a picture itself, at its own line.
    assert held[1] - held[0] < 50 * 512


def test_the_encoder_of_pictures_is_opened_when_it_is_needed(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path / "bundle")
    pixels = TensorSpec("sample", "float32", ("batch", 3, "h2", "w2"))
    encoder = Component(
        "vae_encoder", "encode_image", "x.onnx", (pixels,), (TensorSpec("latent_parameters", "float32", ("batch", 8, "height", "width")),)
    )
    bundle = replace(fakes.bundle, components=(*fakes.bundle.components, encoder))
    sessions = {"text_encoder": fakes.encode, "unet": fakes.denoise, "vae_decoder": fakes.decode}
    opened: list[str] = []

    def load(components: Any) -> Any:
        opened.extend(c.name for c in components)
        return [Graph(c, FakeSession.of(c, lambda feeds: np.zeros((1, 8, 8, 8)))) for c in components]

    pipe = Pipeline(bundle, sessions, load=load)
    pipe(PROMPT, num_inference_steps=1)
    assert opened == []
    for _ in range(2):
        pipe(PROMPT, image=np.zeros((16, 16, 3), np.uint8), num_inference_steps=2)
    assert opened == ["vae_encoder"]
