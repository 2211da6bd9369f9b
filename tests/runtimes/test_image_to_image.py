"""Image to image: diffusers' pictures from the same networks and seeds, and what cannot be started from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import diffusers
import torch
from PIL import Image

from edgediffusion.bundle import Component, NoiseSchedule, Sampling, TensorSpec
from edgediffusion.errors import ArgumentError, BundleError
from edgediffusion.registry import names
from edgediffusion.runtimes import Pipeline, Request
from edgediffusion.runtimes.images import open_image
from edgediffusion.runtimes.request import plan
from edgediffusion.runtimes.samplers import resolve

from .test_against_diffusers import as_function
from .tiny import ENCODE, SAMPLING, TOKENS, FakeSession, write_bundle, write_tokenizer
from .twins import LEVEL, PROMPTS, Twins, autoencoder_components, autoencoder_sessions, picture, vae

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    return Twins(tmp_path_factory.mktemp("twins") / "bundle")


def drawn(twins: Twins, sampler: str, **arguments: Any) -> np.ndarray:
    generator = [torch.Generator().manual_seed(s) for s in (5, 6)] if arguments.pop("each", False) else torch.Generator().manual_seed(5)
    pipe = twins.theirs("StableDiffusionImg2ImgPipeline", sampler)
    images: np.ndarray = pipe(generator=generator, output_type="np", **arguments).images
    return images


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler-ancestral", "dpmpp-2m", "heun", "unipc"])
def test_equals_diffusers(twins: Twins, sampler: str, strength: float) -> None:
    asked = {"image": picture(1), "strength": strength, "num_inference_steps": 8, "guidance_scale": 4.0, "negative_prompt": "blue"}
    theirs = drawn(twins, sampler, prompt=PROMPTS[0], **asked)
    ours = twins.ours(PROMPTS[0], seed=5, sampler=sampler, **asked)
    assert np.abs(ours.pixels - theirs).max() < LEVEL
    calls = 2 if sampler == "heun" else 1
    assert len(ours.timings.step_ms) == calls * int(8 * strength) - (calls - 1)


def test_a_batch_of_pictures_equals_diffusers(twins: Twins) -> None:
    asked = {"image": [picture(1), picture(2)], "strength": 0.5, "num_inference_steps": 6, "guidance_scale": 4.0}
    theirs = drawn(twins, "euler", prompt=PROMPTS, **asked)
    ours = twins.ours(PROMPTS, seed=5, sampler="euler", **asked)
    assert np.abs(ours.pixels - theirs).max() < LEVEL


def test_a_seed_for_each_picture_equals_diffusers(twins: Twins) -> None:
    asked = {"image": picture(1), "strength": 0.5, "num_inference_steps": 6, "guidance_scale": 4.0}
    theirs = drawn(twins, "euler-ancestral", each=True, prompt=PROMPTS, **asked)
    ours = twins.ours(PROMPTS, seed=[5, 6], sampler="euler-ancestral", **asked)
    assert np.abs(ours.pixels - theirs).max() < LEVEL


def test_a_picture_of_odd_size_is_cut_down_as_diffusers_does_and_said_so(twins: Twins) -> None:
    asked = {"image": picture(3, (27, 19)), "num_inference_steps": 5, "guidance_scale": 1.0}
    theirs = drawn(twins, "ddim", prompt=PROMPTS[0], **{**asked, "image": picture(3, (27, 19)).resize((24, 16), Image.Resampling.LANCZOS)})
    ours = twins.ours(PROMPTS[0], seed=5, sampler="ddim", **asked)
    assert np.abs(ours.pixels - theirs).max() < LEVEL
    assert twins.ours("a cat", **asked).warnings == ("The picture of 19 x 27 was resized to 16 x 24 (height x width).",)


def test_images_of_a_prompt_start_from_the_picture_of_that_prompt(twins: Twins) -> None:
    """At a strength that leaves one step of many, a picture is nearly what it started from."""
    both = twins.ours(PROMPTS, image=[picture(1), picture(2)], strength=0.02, num_inference_steps=50, num_images=2, guidance_scale=1.0)
    alone = [twins.ours(PROMPTS[i], image=picture(i + 1), strength=0.02, num_inference_steps=50, guidance_scale=1.0) for i in (0, 1)]
    distances = np.array([[np.abs(row - one.pixels[0]).mean() for one in alone] for row in both.pixels])
    assert distances.argmin(axis=1).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("how", ["pillow", "palette", "uint8", "float", "batch"])
def test_every_form_of_a_picture_is_the_same_picture(twins: Twins, how: str) -> None:
    image = picture(1).quantize(64)
    array = np.asarray(image.convert("RGB"))
    given: Any = {"pillow": image.convert("RGB"), "palette": image, "uint8": array, "float": array / 255, "batch": array[None]}[how]
    asked = {"strength": 0.5, "num_inference_steps": 2, "guidance_scale": 1.0}
    found, wanted = (twins.ours(PROMPTS[0], image=one, **asked).pixels for one in (given, image.convert("RGB")))
    np.testing.assert_allclose(found, wanted, atol=1e-6)  # uint8 / 255 in float32 or in float64


def test_tiles_equal_those_of_diffusers(twins: Twins) -> None:
    asked = {"image": picture(1, (40, 32)), "strength": 0.5, "num_inference_steps": 4, "guidance_scale": 1.0}
    pipe = twins.theirs("StableDiffusionImg2ImgPipeline", "ddim")
    pipe.vae.enable_tiling()
    try:
        theirs = pipe(PROMPTS[0], generator=torch.Generator().manual_seed(5), output_type="np", **asked).images
    finally:
        pipe.vae.disable_tiling()
    ours = twins.ours(PROMPTS[0], seed=5, sampler="ddim", tile=16, **asked)
    whole = twins.ours(PROMPTS[0], seed=5, sampler="ddim", **asked)
    assert np.abs(ours.pixels - theirs).max() < LEVEL < np.abs(ours.pixels - whole.pixels).max()


def test_stable_diffusion_3_equals_diffusers(tmp_path: Path) -> None:
    flow = Flow(tmp_path / "bundle")
    for strength in (0.55, 0.6):  # of 10 steps; the number of those left out is rounded down
        asked = {"image": picture(1), "strength": strength, "num_inference_steps": 10, "guidance_scale": 4.0}
        theirs = flow.theirs("StableDiffusion3Img2ImgPipeline", **asked)
        ours = flow.ours("a cat", seed=5, **asked)
        assert len(ours.timings.step_ms) == 6
        assert np.abs(ours.pixels - theirs).max() < LEVEL


class Flow:
    """A tiny transformer of Stable Diffusion 3's kind, whose texts are given as states: of the prompt, and of no prompt."""

    def __init__(self, folder: Path):
        torch.manual_seed(0)
        self.transformer = diffusers.SD3Transformer2DModel(
            sample_size=16,
            patch_size=1,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            caption_projection_dim=16,
            pooled_projection_dim=10,
            pos_embed_max_size=32,
        ).eval()
        self.vae = vae(16)
        self.vae.register_to_config(shift_factor=0.1)
        self.states = torch.randn(2, TOKENS, 12)
        self.pooled = torch.randn(2, 10)
        self.ours = self._ours(folder)

    def theirs(self, family: str, **arguments: Any) -> np.ndarray:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        texts = {f"{kind}{suffix}": None for kind in ("text_encoder", "tokenizer") for suffix in ("", "_2", "_3")}
        pipe = getattr(diffusers, family)(transformer=self.transformer, vae=self.vae, scheduler=scheduler, **texts)
        pipe.set_progress_bar_config(disable=True)
        images = pipe(
            negative_prompt_embeds=self.states[:1],
            prompt_embeds=self.states[1:],
            negative_pooled_prompt_embeds=self.pooled[:1],
            pooled_prompt_embeds=self.pooled[1:],
            height=16,
            width=24,
            generator=torch.Generator().manual_seed(5),
            **{"output_type": "np", **arguments},
        ).images
        return np.asarray(images)

    def _ours(self, folder: Path) -> Pipeline:
        latent = ("batch", 16, "height", "width")
        states = TensorSpec("states", "float32", ("batch", TOKENS, 12))
        pooled = TensorSpec("pooled", "float32", ("batch", 10))
        encode = replace(ENCODE, outputs=(states, pooled), feeds={})
        inputs = (TensorSpec("sample", "float32", latent), TensorSpec("timestep", "float32", ("batch",)), states, pooled)
        denoise = Component("transformer", "denoise", "unet/model.onnx", inputs, (TensorSpec("out_sample", "float32", latent),))
        sampling: Sampling = replace(
            SAMPLING, prediction="flow", schedule=NoiseSchedule("flow", 1000, shift=3.0), sampler="flow-euler", latent_shift=0.1
        )
        sampling = replace(sampling, latent_channels=16)
        bundle = replace(write_bundle(folder), components=(encode, denoise, *autoencoder_components(16)), sampling=sampling)
        write_tokenizer(folder / "tokenizer" / "tokenizer.json")

        def texts(feeds: Any) -> Any:
            row = slice(1, 2) if (feeds["input_ids"][0, 1:] != 1).any() else slice(0, 1)  # anything but marks and padding
            return {"states": self.states[row].numpy(), "pooled": self.pooled[row].numpy()}

        call = as_function(lambda f: self.transformer(f["sample"], f["states"], f["pooled"], f["timestep"]).sample)
        sessions = {"text_encoder": FakeSession.of(encode, texts), "transformer": FakeSession.of(denoise, call)}
        return Pipeline(bundle, {**sessions, **autoencoder_sessions(self.vae, 16)})


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"strength": 0.0}, r"strength cannot be used. Got: 0.0. Allowed: above 0"),
            ({"strength": 1.5}, r"Got: 1.5"),
            ({"strength": float("nan")}, r"Got: nan"),
            ({"strength": 0.1, "num_inference_steps": 5}, r"strength 0.1 no step of 5 is left"),
            ({"image": "a.png"}, r"no picture. Got: str 'a.png'. Allowed: Pillow"),
            ({"image": []}, r"list of pictures is empty"),
            ({"image": [picture(1)] * 3}, r"one per prompt. Got: 3 for 2"),
            ({"image": [picture(1), picture(1, (16, 16))]}, r"different sizes. Got: 16 x 16 and 16 x 24"),
            ({"image": np.zeros(5)}, r"no picture. Got: an array of shape \(5,\)"),
            ({"image": np.zeros((16, 24, 4))}, r"another shape. Got: \(16, 24, 4\). Allowed: \(16, 24, 3\)"),
            ({"image": np.zeros((17, 24, 3))}, r"another shape. Got: \(17, 24, 3\). Allowed: \(16, 24, 3\)"),
            ({"image": np.full((16, 24, 3), 2.0)}, r"other values. Got: float64 from 2.0 to 2.0"),
            ({"image": np.full((16, 24, 3), np.nan)}, r"other values"),
            ({"tile": 12}, r"tile cannot be used. Got: 12. Allowed: multiples of 8"),
            ({"tile": 0}, r"Got: 0"),
        ],
    )
    def test_says_what_is_wrong_and_what_is_allowed(self, twins: Twins, options: dict[str, Any], message: str) -> None:
        before = len(twins.sessions["unet"].calls)
        with pytest.raises(ArgumentError, match=message):
            twins.ours(PROMPTS, **{"image": picture(1), **options})
        assert len(twins.sessions["unet"].calls) == before

    def test_a_strength_without_a_picture_is_warned_of(self, twins: Twins) -> None:
        assert "strength has no effect" in twins.ours("a cat", strength=0.5, num_inference_steps=1).warnings[0]

    def test_a_bundle_that_encodes_no_pictures(self, twins: Twins) -> None:
        bundle = replace(twins.bundle, components=twins.bundle.components[:-1])
        pipe = Pipeline(bundle, {name: session for name, session in twins.sessions.items() if name != "vae_encoder"})
        with pytest.raises(BundleError, match=r"cannot start from a picture: it has no graph that encodes one.*Export"):
            pipe("a cat", image=picture(1))

    def test_a_file_that_is_no_picture(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_text("precious", encoding="utf-8")
        picture(1).save(tmp_path / "b.png")
        (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:200])
        for name, message in (("a.png", "cannot identify"), ("b.png", ""), ("c.png", "there is no such file")):
            with pytest.raises(ArgumentError, match=f"'.*{name}' cannot be read as a picture. Got: .*{message}"):
                open_image(tmp_path / name)

    def test_a_photograph_is_turned_as_its_camera_was(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # orientation: to be turned by a quarter
        picture(1).save(tmp_path / "a.jpg", exif=exif)
        assert open_image(tmp_path / "a.jpg").size == (16, 24)


class TestWhereToBegin:
    @pytest.mark.parametrize("sampler", [name for name in names("runtimes.samplers") if name != "restart"])
    def test_every_sampler_begins_in_the_middle_of_its_walk(self, twins: Twins, sampler: str) -> None:
        flow = resolve(sampler)[1].KIND == "flow"
        sampling = replace(SAMPLING, prediction="flow", schedule=NoiseSchedule("flow", 1000)) if flow else twins.bundle.sampling
        assert sampling is not None
        asked = {"image": picture(1), "sampler": sampler, "num_inference_steps": 8}
        whole, half = (plan(Request("", strength=strength, **asked), sampling) for strength in (1.0, 0.5))
        assert half.points.at[-1] == whole.points.at[-1]
        assert half.points.to[-1] == whole.points.to[-1]
        levels = [at.sigma / at.alpha for at in whole.points.at if at.alpha > 0]
        assert min(levels) < half.points.at[0].sigma / half.points.at[0].alpha < max(levels)

    def test_a_sampler_that_repeats_its_first_step_repeats_that_of_the_rest(self, twins: Twins) -> None:
        assert twins.bundle.sampling is not None
        found = plan(Request("", image=picture(1), strength=0.5, sampler="pndm", num_inference_steps=8), twins.bundle.sampling)
        assert [at.timestep for at in found.points.at] == [376, 251, 251, 126, 1]

    def test_pndm_stays_near_other_samplers(self, twins: Twins) -> None:
        asked = {"image": picture(1), "strength": 0.5, "num_inference_steps": 50, "guidance_scale": 1.0}
        ddim, pndm = (twins.ours("a cat", sampler=sampler, **asked).latents for sampler in ("ddim", "pndm"))
        assert np.abs(pndm - ddim).max() < 0.1 * np.abs(ddim).max()

    def test_a_sampler_that_cannot(self, twins: Twins) -> None:
        with pytest.raises(ArgumentError, match="'restart' cannot begin in the middle"):
            twins.ours("a cat", image=picture(1), sampler="restart", num_inference_steps=20, strength=0.5)
