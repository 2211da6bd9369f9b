"""What networks are told beside texts: sizes, and zeros for no negative prompt; encoders that give one condition side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgediffusion.bundle import SIZES, Sampling, TensorSpec
from edgediffusion.errors import ArgumentError
from edgediffusion.runtimes import Pipeline
from edgediffusion.runtimes.request import Request
from edgediffusion.runtimes.time_ids import time_ids

from .test_pipeline import PROMPT
from .tiny import DECODE, DENOISE, ENCODE, SAMPLING, TOKENS, FakeSession, with_input, write_bundle

TOLD = replace(SAMPLING, time_ids=SIZES, zero_unconditional=True)
REFINER = replace(SAMPLING, time_ids=(*SIZES[:4], "aesthetic_score"))


@pytest.mark.parametrize(
    ("options", "told", "away"),
    [
        ({}, (48, 64, 0, 0, 48, 64), (48, 64, 0, 0, 48, 64)),
        (
            {"original_size": (100, 200), "crops_coords_top_left": (3, 4), "target_size": (5, 6)},
            (100, 200, 3, 4, 5, 6),
            (100, 200, 3, 4, 5, 6),
        ),
        ({"negative_original_size": (1, 2), "negative_target_size": (3, 4)}, (48, 64, 0, 0, 48, 64), (1, 2, 0, 0, 3, 4)),
    ],
)
def test_sizes(options: Mapping[str, Any], told: tuple[float, ...], away: tuple[float, ...]) -> None:
    """As ``_get_add_time_ids`` of StableDiffusionXLPipeline, diffusers 0.42.1, puts them: original size, crop, target size."""
    assert time_ids(Request(PROMPT, **options), TOLD, (48, 64)) == (told, away)


def test_scores() -> None:
    """As StableDiffusionXLImg2ImgPipeline does for a refiner, with its defaults."""
    assert time_ids(Request(PROMPT), REFINER, (48, 64)) == ((48, 64, 0, 0, 6.0), (48, 64, 0, 0, 2.5))
    assert time_ids(Request(PROMPT, aesthetic_score=7.0), REFINER, (48, 64))[0][-1] == 7.0


@pytest.mark.parametrize("given", [(1, 2, 3), (), (-1, 4)])
def test_refuses(given: tuple[float, ...]) -> None:
    with pytest.raises(ArgumentError, match="original_size cannot be used.*Allowed: height and width"):
        time_ids(Request(PROMPT, original_size=given), TOLD, (48, 64))


class Two:
    """Two encoders beside each other: the first gives 6 numbers a token, the second 5 and an embedding."""

    def __init__(self, folder: Path, sampling: Sampling = TOLD):
        wide = TensorSpec("encoder_hidden_states", "float32", ("batch", TOKENS, 11))
        denoise = with_input(
            DENOISE, wide, TensorSpec("text_embeds", "float32", ("batch", 3)), TensorSpec("time_ids", "float32", ("batch", 6))
        )
        states, embeds = (
            TensorSpec("last_hidden_state", "float32", ("batch", TOKENS, 5)),
            TensorSpec("text_embeds", "float32", ("batch", 3)),
        )
        second = replace(ENCODE, name="text_encoder_2", outputs=(states, embeds))
        bundle = replace(write_bundle(folder), components=(ENCODE, second, denoise, DECODE), sampling=sampling)
        self.unet = FakeSession.of(denoise, lambda feeds: np.tanh(feeds["sample"]))
        sessions = {
            "text_encoder": FakeSession.of(ENCODE, lambda feeds: np.full((1, TOKENS, 6), 1 + feeds["input_ids"].sum())),
            "text_encoder_2": FakeSession.of(
                second, lambda feeds: {"last_hidden_state": np.full((1, TOKENS, 5), 2.0), "text_embeds": np.full((1, 3), 3.0)}
            ),
            "unet": self.unet,
            "vae_decoder": FakeSession.of(DECODE, lambda feeds: np.zeros(())),
        }
        self.pipe = Pipeline(bundle, sessions)

    def fed(self, **options: Any) -> dict[str, np.ndarray]:
        self.pipe(PROMPT, num_inference_steps=1, **options)
        return self.unet.calls[-1]


def test_states_lie_side_by_side_in_the_order_of_the_encoders(tmp_path: Path) -> None:
    states = Two(tmp_path / "bundle").fed(guidance_scale=1.0)["encoder_hidden_states"]
    assert states.shape == (1, TOKENS, 11)
    assert (states[0, :, :6] > 1).all()
    assert (states[0, :, 6:] == 2).all()


def test_no_negative_prompt_is_zeros_and_an_empty_one_is_not(tmp_path: Path) -> None:
    two = Two(tmp_path / "bundle")
    fed = two.fed()
    for name in ("encoder_hidden_states", "text_embeds"):
        assert (fed[name][0] == 0).all()
        assert (fed[name][1] != 0).all()
    assert fed["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    assert (two.fed(negative_prompt="")["text_embeds"] == 3).all()
    assert (two.fed()["text_embeds"][0] == 0).all()  # what an encoder gave is kept, and was not written to


def test_without_that_fact_no_negative_prompt_is_the_empty_one(tmp_path: Path) -> None:
    fed = Two(tmp_path / "bundle", replace(TOLD, zero_unconditional=False)).fed()
    assert (fed["text_embeds"] == 3).all()


def test_sizes_follow_the_picture(tmp_path: Path) -> None:
    two = Two(tmp_path / "bundle")
    assert two.fed(height=32, width=24)["time_ids"][0].tolist() == [32, 24, 0, 0, 32, 24]
    assert two.fed(original_size=(512, 512), negative_target_size=(8, 8))["time_ids"].tolist() == [
        [512, 512, 0, 0, 8, 8],
        [512, 512, 0, 0, 16, 16],
    ]


def test_a_network_that_is_told_nothing_says_so(tmp_path: Path) -> None:
    pipe = Pipeline.from_bundle(write_bundle(tmp_path / "bundle"), threads=1)
    warnings = pipe(PROMPT, target_size=(16, 16), num_inference_steps=1).warnings
    assert warnings == ("target_size without effect: this network is told no sizes.",)
