"""ControlNets in the loop, as plain functions: when they run, with what, and what the denoiser is fed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgediffusion.bundle import Component, TensorSpec
from edgediffusion.errors import ArgumentError
from edgediffusion.runtimes import Pipeline
from edgediffusion.runtimes.control import Control, Lead, _parts

from .test_pipeline import PROMPT
from .tiny import DECODE, DENOISE, ENCODE, LATENT, FakeSession, Function, with_input, write_bundle

RESIDUAL = TensorSpec("mid_block_additional_residual", "float32", LATENT)
PICTURE = np.linspace(0, 1, 16 * 16 * 3, dtype=np.float32).reshape(16, 16, 3)


def controlnet(number: int) -> Component:
    suffix = f"_{number}" if number else ""
    added = (
        TensorSpec(f"controlnet_cond{suffix}", "float32", ("batch", 3, "image_height", "image_width")),
        TensorSpec(f"conditioning_scale{suffix}", "float32", (1,)),
    )
    return Component(f"controlnet{suffix}", "control", f"controlnet{suffix}/model.onnx", (*DENOISE.inputs, *added), (RESIDUAL,))


class Led:
    """A pipeline whose ControlNets give their number plus one, times the scale, and remember their calls."""

    def __init__(self, folder: Path, count: int = 1):
        denoise = with_input(DENOISE, RESIDUAL)
        controls = [controlnet(number) for number in range(count)]
        self.unet = FakeSession.of(denoise, lambda feeds: np.tanh(feeds["sample"] + feeds[RESIDUAL.name]))
        self.controls = [FakeSession.of(c, self._answer(number)) for number, c in enumerate(controls)]
        bundle = write_bundle(folder)
        encode = FakeSession.of(ENCODE, lambda feeds: np.zeros((1, 8, 6)))
        decode = FakeSession.of(DECODE, lambda feeds: np.zeros(()))
        self.pipe = Pipeline(
            replace(bundle, components=(ENCODE, *controls, denoise, DECODE)),
            {
                "text_encoder": encode,
                "unet": self.unet,
                "vae_decoder": decode,
                **dict(zip([c.name for c in controls], self.controls, strict=True)),
            },
        )

    @staticmethod
    def _answer(number: int) -> Function:
        suffix = f"_{number}" if number else ""
        return lambda feeds: np.full(feeds["sample"].shape, (number + 1) * feeds[f"conditioning_scale{suffix}"].item())

    @property
    def fed(self) -> list[float]:
        """What the denoiser was fed of the ControlNets, at each call."""
        return [float(feeds[RESIDUAL.name].mean()) for feeds in self.unet.calls]


def test_it_sees_the_picture_in_both_rows_and_what_the_denoiser_sees(tmp_path: Path) -> None:
    led = Led(tmp_path / "bundle")
    led.pipe([PROMPT, PROMPT], control_image=PICTURE, num_inference_steps=2)
    feeds = led.controls[0].calls[0]
    assert feeds["controlnet_cond"].shape == (4, 3, 16, 16)
    np.testing.assert_array_equal(feeds["controlnet_cond"], np.tile(PICTURE.transpose(2, 0, 1), (4, 1, 1, 1)))
    assert all(np.array_equal(feeds[name], led.unet.calls[0][name]) for name in ("sample", "timestep", "encoder_hidden_states"))
    assert led.fed == [1.0, 1.0]


def test_a_picture_for_each_prompt(tmp_path: Path) -> None:
    led = Led(tmp_path / "bundle")
    led.pipe([PROMPT, PROMPT], control_image=[PICTURE, 1 - PICTURE], num_images=2, guidance_scale=1.0, num_inference_steps=1)
    means = led.controls[0].calls[0]["controlnet_cond"][:, 0, 0, 1]
    np.testing.assert_allclose(means, [PICTURE[0, 1, 0]] * 2 + [1 - PICTURE[0, 1, 0]] * 2, rtol=1e-6)


def test_several_are_added_and_one_that_does_not_lead_does_not_run(tmp_path: Path) -> None:
    led = Led(tmp_path / "bundle", count=3)
    led.pipe(
        PROMPT,
        control_image=[PICTURE] * 3,
        controlnet_conditioning_scale=[0.5, 1.0, 2.0],
        control_guidance_end=[1.0, 0.5, 0.5],
        num_inference_steps=4,
    )
    assert led.fed == [0.5 + 2 + 6, 0.5 + 2 + 6, 0.5, 0.5]
    assert [len(session.calls) for session in led.controls] == [4, 2, 2]


def test_outside_of_its_part_residuals_are_zero(tmp_path: Path) -> None:
    led = Led(tmp_path / "bundle")
    led.pipe(PROMPT, control_image=PICTURE, control_guidance_start=0.25, control_guidance_end=0.75, num_inference_steps=4)
    assert led.fed == [0.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize(("start", "end", "calls"), [(0.0, 1.0, 7), (0.3, 1.0, 7), (0.0, 0.5, 7), (0.21, 0.79, 20)])
def test_the_part_is_diffusers(start: float, end: float, calls: int) -> None:
    """``controlnet_keep`` of StableDiffusionControlNetPipeline, diffusers 0.42.1."""
    keep = [1.0 - float(i / calls < start or (i + 1) / calls > end) for i in range(calls)]
    assert [Lead(1.0, start, end).at(i, calls) for i in range(calls)] == keep


def test_rows_apart_and_where_guidance_is_off(tmp_path: Path) -> None:
    led = Led(tmp_path / "bundle")
    led.pipe(PROMPT, control_image=PICTURE, num_inference_steps=2, guidance_batch="separate")
    assert [len(feeds["controlnet_cond"]) for feeds in led.controls[0].calls] == [1] * 4
    assert led.fed == [1.0] * 4
    led.unet.calls.clear()
    led.pipe(PROMPT, control_image=PICTURE, num_inference_steps=2, guidance_interval=(1e6, 1e7))
    assert [len(feeds["sample"]) for feeds in led.unet.calls] == [1, 1]
    assert led.fed == [1.0] * 2


def test_a_solver_with_two_calls_a_step_is_led_at_each_call(tmp_path: Path) -> None:
    led = Led(tmp_path / "bundle")
    led.pipe(PROMPT, control_image=PICTURE, num_inference_steps=3, sampler="heun", control_guidance_end=0.6)
    assert led.fed == [1.0, 1.0, 1.0, 0.0, 0.0]  # diffusers counts the five calls, not the three steps


def test_an_observer_is_told_what_the_denoiser_is_fed(tmp_path: Path) -> None:
    """So that calibration sees all of its inputs, and nothing else."""
    led, seen = Led(tmp_path / "bundle"), []
    led.pipe(PROMPT, control_image=PICTURE, num_inference_steps=2, observe=lambda step, fed: seen.append(fed))
    assert set(seen[0]) == {spec.name for spec in led.unet.inputs}
    assert [fed[RESIDUAL.name].mean() for fed in seen] == [1.0, 1.0]
    assert len(led.controls[0].calls) == 2  # it ran once a call for both


def test_questions_aside_are_led_as_the_nearest_step_is(tmp_path: Path) -> None:
    led = Led(tmp_path / "bundle")
    predict = led.pipe.predictor(PROMPT, control_image=PICTURE, num_inference_steps=4, control_guidance_start=0.5)
    for i in range(4):
        predict(np.zeros((1, 4, 8, 8), np.float32), i)
    assert led.fed == [0.0, 0.0, 1.0, 1.0]


def test_the_size_is_the_pictures(tmp_path: Path) -> None:
    led = Led(tmp_path / "bundle")
    wide = np.zeros((18, 25, 3), np.uint8)
    with pytest.raises(ArgumentError, match="another shape"):  # an array must fit
        led.pipe(PROMPT, control_image=wide, num_inference_steps=1)
    led.pipe(PROMPT, control_image=np.zeros((16, 24, 3), np.uint8), num_inference_steps=1)
    assert led.unet.calls[-1]["sample"].shape[2:] == (8, 12)


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (1, {}, "led by a picture. Give control_image"),
        (1, {"control_image": "edges.png"}, "This is no picture. Got: str"),
        (1, {"control_image": []}, "list of pictures is empty"),
        (1, {"control_image": [PICTURE, PICTURE]}, "one per prompt. Got: 2 for 1"),
        (1, {"control_image": PICTURE, "controlnet_conditioning_scale": [1.0, 1.0]}, "one number for each ControlNet. Got: 2. Allowed: 1"),
        (1, {"control_image": PICTURE, "controlnet_conditioning_scale": float("nan")}, "conditioning_scale cannot be used. Got: nan"),
        (1, {"control_image": PICTURE, "control_guidance_start": 0.5, "control_guidance_end": 0.5}, "cannot be used.*start 0.5"),
        (1, {"control_image": PICTURE, "control_guidance_end": 1.5}, "Allowed: 0 to 1"),
        (1, {"control_image": PICTURE, "height": 18}, "size of the picture cannot be used. Got: 18 x 16.*multiples of 4"),
        (2, {"control_image": PICTURE}, "a picture of its own. Got: ndarray. Allowed: a list of 2"),
        (2, {"control_image": [PICTURE]}, "Got: a list of 1"),
    ],
)
def test_refuses(tmp_path: Path, count: int, options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Led(tmp_path / "bundle", count).pipe(PROMPT, num_inference_steps=2, **options)


def test_a_bundle_without_controlnets_says_that_a_control_picture_is_nothing_to_it(tmp_path: Path) -> None:
    pipe = Pipeline.from_bundle(write_bundle(tmp_path / "bundle"), threads=1)
    assert pipe(PROMPT, control_image=PICTURE, num_inference_steps=1).warnings == (
        "control_image has no effect: no ControlNet is in this bundle.",
    )


def test_a_stream_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="not led by control pictures"):
        Led(tmp_path / "bundle").pipe.prepared(PROMPT)


def test_no_picture_has_no_size() -> None:
    assert Control(None, 1.0, 0.0, 1.0).size is None
    assert Control([[PICTURE], [PICTURE]], 1.0, 0.0, 1.0).size == (16, 16)


def test_guess_mode_leads_the_conditional_rows_alone(tmp_path: Path) -> None:
    """The fake has one residual, which goes to the middle; a single number of ``logspace(-1, 0)`` is its first one, a tenth."""
    led = Led(tmp_path / "bundle", count=2)
    pictures: Any = [PICTURE, PICTURE]
    led.pipe(PROMPT, control_image=pictures, num_inference_steps=1, guess_mode=True)
    np.testing.assert_allclose(led.unet.calls[0][RESIDUAL.name].mean(axis=(1, 2, 3)), [0, 0.3], rtol=1e-6)
    led.unet.calls.clear()
    for session in led.controls:
        session.calls.clear()
    led.pipe(PROMPT, control_image=pictures, num_inference_steps=1, guess_mode=True, guidance_batch="separate")
    np.testing.assert_allclose(led.fed, [0, 0.3], rtol=1e-6)
    assert [len(session.calls) for session in led.controls] == [1, 1]  # not for the row that they do not lead


def test_what_counts_how_much_in_guess_mode() -> None:
    names = ["mid_block_additional_residual", *(f"down_block_additional_residual_{k}" for k in range(12))]
    parts = _parts(names)
    wanted = [0.1, *(10 ** (k / 12 - 1) for k in range(1, 12)), 1.0]
    np.testing.assert_allclose([parts[name] for name in (*names[1:], names[0])], wanted)
