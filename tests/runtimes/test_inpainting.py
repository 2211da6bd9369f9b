"""Inpainting, by networks that were trained for it and by others: diffusers' pictures from the same networks and seeds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import torch
from PIL import Image

from edgediffusion.bundle import TensorSpec
from edgediffusion.errors import ArgumentError, BundleError
from edgediffusion.runtimes import Pipeline

from .test_image_to_image import Flow
from .tiny import with_input
from .twins import LEVEL, PROMPTS, Twins, mask, picture

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
NAME = "StableDiffusionInpaintPipeline"


@pytest.fixture(scope="module")
def led(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    """Networks that were not trained to fill in."""
    return Twins(tmp_path_factory.mktemp("led") / "bundle")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    return Twins(tmp_path_factory.mktemp("trained") / "bundle", channels=9)


@pytest.fixture(params=["led", "trained"])
def twins(request: pytest.FixtureRequest) -> Twins:
    found: Twins = request.getfixturevalue(request.param)
    return found


def drawn(twins: Twins, sampler: str, **arguments: Any) -> np.ndarray:
    generator = [torch.Generator().manual_seed(s) for s in (5, 6)] if arguments.pop("each", False) else torch.Generator().manual_seed(5)
    images: np.ndarray = twins.theirs(NAME, sampler)(generator=generator, output_type="np", height=16, width=24, **arguments).images
    return images


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler-ancestral", "dpmpp-2m"])
def test_equals_diffusers(twins: Twins, sampler: str, strength: float) -> None:
    asked = {"image": picture(1), "mask_image": mask(), "strength": strength, "num_inference_steps": 6, "guidance_scale": 4.0}
    theirs = drawn(twins, sampler, prompt=PROMPTS[0], **asked)
    ours = twins.ours(PROMPTS[0], seed=5, sampler=sampler, **asked)
    assert np.abs(ours.pixels - theirs).max() < LEVEL


def test_without_guidance_equals_diffusers(twins: Twins) -> None:
    asked = {"image": picture(1), "mask_image": mask(), "num_inference_steps": 4, "guidance_scale": 1.0}
    theirs = drawn(twins, "ddim", prompt=PROMPTS[0], **asked)
    assert np.abs(twins.ours(PROMPTS[0], seed=5, sampler="ddim", **asked).pixels - theirs).max() < LEVEL


@pytest.mark.parametrize("each", [False, True])
def test_a_batch_equals_diffusers(twins: Twins, each: bool) -> None:
    masks = [mask(), mask().transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    asked = {"image": [picture(1), picture(2)], "mask_image": masks, "strength": 0.7, "num_inference_steps": 4, "guidance_scale": 4.0}
    theirs = drawn(twins, "euler-ancestral", prompt=PROMPTS, each=each, **asked)
    ours = twins.ours(PROMPTS, seed=[5, 6] if each else 5, sampler="euler-ancestral", **asked)
    assert np.abs(ours.pixels - theirs).max() < LEVEL


def test_sizes_that_are_asked_for_resize_picture_and_mask(twins: Twins) -> None:
    asked = {"image": picture(1, (40, 30)), "mask_image": mask((40, 30)), "num_inference_steps": 4, "guidance_scale": 4.0}
    theirs = drawn(twins, "ddim", prompt=PROMPTS[0], **asked)
    ours = twins.ours(PROMPTS[0], seed=5, sampler="ddim", height=16, width=24, **asked)
    assert np.abs(ours.pixels - theirs).max() < LEVEL


def test_stable_diffusion_3_equals_diffusers(tmp_path: Path) -> None:
    flow = Flow(tmp_path / "bundle")
    asked = {"image": picture(1), "mask_image": mask(), "strength": 0.6, "num_inference_steps": 5, "guidance_scale": 4.0}
    latents = torch.from_numpy(flow.theirs("StableDiffusion3InpaintPipeline", **{**asked, "output_type": "latent"}))
    # diffusers 0.42.1 forgets the shift of the latents when this pipeline decodes; its other ones do not.
    with torch.no_grad():
        theirs = flow.vae.decode(latents / flow.vae.config.scaling_factor + flow.vae.config.shift_factor).sample / 2 + 0.5
    ours = flow.ours("a cat", seed=5, **asked)
    assert np.abs(ours.pixels - theirs.clamp(0, 1).permute(0, 2, 3, 1).numpy()).max() < LEVEL


def test_what_is_kept_is_the_picture_itself(led: Twins) -> None:
    """The latents of the part that is kept are those of the picture, to the last bit, whatever the steps did."""
    nothing = Image.new("L", (24, 16), 0)
    kept = led.ours("a cat", image=picture(1), mask_image=nothing, num_inference_steps=3, seed=4)
    other = led.ours("a shirt", image=picture(1), mask_image=nothing, num_inference_steps=2, seed=4, sampler="euler")
    assert kept.latents.tobytes() == other.latents.tobytes()


def test_a_network_that_was_trained_for_it_sees_mask_and_rest_beside_the_state(trained: Twins) -> None:
    trained.sessions["unet"].calls.clear()
    trained.ours("a cat", image=picture(1), mask_image=mask(), num_inference_steps=2, guidance_scale=4.0)
    first, second = trained.sessions["unet"].calls
    expected = (np.asarray(mask()) >= 127.5)[::2, ::2]
    for feeds in (first, second):
        assert feeds["sample"].shape == (2, 9, 8, 12)
        np.testing.assert_array_equal(feeds["sample"][0], feeds["sample"][1])
        np.testing.assert_array_equal(feeds["sample"][0, 4], expected)
    np.testing.assert_array_equal(first["sample"][:, 4:], second["sample"][:, 4:])
    assert not np.array_equal(first["sample"][:, :4], second["sample"][:, :4])


def test_both_rows_of_guidance_apart_make_the_same_picture(twins: Twins) -> None:
    asked = {"image": picture(1), "mask_image": mask(), "num_inference_steps": 3, "guidance_scale": 4.0}
    joint, apart = (twins.ours(PROMPTS, guidance_batch=way, **asked).pixels for way in ("joint", "separate"))
    np.testing.assert_allclose(apart, joint, rtol=0, atol=1e-5)  # torch adds in another order in another batch


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"mask_image": mask()}, "mask needs the picture"),
            ({"image": picture(1), "mask_image": mask((16, 16))}, r"mask and its picture have different sizes. Got: 16 x 16 and 16 x 24"),
            ({"image": picture(1), "mask_image": "b.png"}, r"no picture. Got: str 'b.png'"),
            ({"image": picture(1), "mask_image": [mask()] * 3}, r"list of masks has one per prompt. Got: 3 for 1"),
            ({"image": picture(1), "mask_image": np.full((16, 24), 255.0)}, r"other values. Got: float64 from 255.0"),
        ],
    )
    def test_says_what_is_wrong_and_what_is_allowed(self, twins: Twins, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ArgumentError, match=message):
            twins.ours("a cat", **options)

    @pytest.mark.parametrize("options", [{}, {"image": picture(1)}])
    def test_a_network_that_fills_in_has_nothing_to_fill(self, trained: Twins, options: dict[str, Any]) -> None:
        with pytest.raises(ArgumentError, match="fills in a part of a picture.*image and mask_image"):
            trained.ours("a cat", **options)

    def test_channels_that_nobody_knows(self, led: Twins) -> None:
        denoise = with_input(led.denoise, TensorSpec("sample", "float32", ("batch", 7, "height", "width")))
        bundle = replace(led.bundle, components=tuple(denoise if c.name == "unet" else c for c in led.bundle.components))
        network = replace(led.sessions["unet"], inputs=denoise.inputs)
        with pytest.raises(BundleError, match="'unet' takes channels that nobody knows. Got: 3 beside the latents"):
            Pipeline(bundle, {**led.sessions, "unet": network})("a cat")
