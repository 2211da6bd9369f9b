"""SDXL's base and refiner sharing a walk, and a text for each encoder: diffusers' pictures, to 2/255, from the same numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from edgediffusion.errors import ArgumentError
from edgediffusion.export import export
from edgediffusion.export.schedule import scheduler_of
from edgediffusion.runtimes import Pipeline
from tests.export.unets_tiny import saved_tiny

PROMPT = "a red shirt"
CLOSE = 2 / 255


@dataclass(frozen=True)
class Pair:
    """A pipeline of diffusers', and ours of the bundle that was exported from it."""

    theirs: Any
    ours: Pipeline

    @classmethod
    def of(cls, name: str, folder: Path) -> Pair:
        source = saved_tiny(name, folder / "source")
        theirs = diffusers.DiffusionPipeline.from_pretrained(source)
        theirs.set_progress_bar_config(disable=True)
        return cls(theirs, Pipeline.from_bundle(export(source, folder / "bundle"), threads=1))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair.of("xl", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def refiner(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair.of("xl-refiner", tmp_path_factory.mktemp("refiner"))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp-2m", "ddim"])
@pytest.mark.parametrize(("steps", "fraction"), [(10, 0.8), (7, 0.45)])
def test_a_walk_of_two_networks_ends_where_that_of_diffusers_does(
    base: Pair, refiner: Pair, sampler: str, steps: int, fraction: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pair in (base, refiner):
        monkeypatch.setattr(pair.theirs, "scheduler", scheduler_of(sampler, {**pair.theirs.scheduler.config, "clip_sample": False}))
    asked: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 4.0}
    left = base.theirs(PROMPT, denoising_end=fraction, output_type="latent", generator=seeded(), **asked).images
    theirs = refiner.theirs(PROMPT, image=left, denoising_start=fraction, output_type="np", generator=seeded(), **asked).images
    first = base.ours(PROMPT, denoising_end=fraction, seed=3, sampler=sampler, **asked)
    second = refiner.ours(PROMPT, image=first.latents, denoising_start=fraction, seed=3, sampler=sampler, **asked)
    assert np.abs(second.pixels - theirs).max() < CLOSE
    assert len(first.pixels) == len(first.images) == 0
    assert [len(part.timings.step_ms) for part in (first, second)] == [base.theirs.num_timesteps, refiner.theirs.num_timesteps]


@pytest.mark.parametrize("sampler", ["ddim", "pndm", "deis", "unipc"])
def test_what_is_handed_over_is_what_diffusers_hands_over(base: Pair, sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of these samplers, whose states are scaled in diffusers as they are here."""
    monkeypatch.setattr(base.theirs, "scheduler", scheduler_of(sampler, {**base.theirs.scheduler.config, "clip_sample": False}))
    asked: dict[str, Any] = {"num_inference_steps": 9, "guidance_scale": 4.0, "denoising_end": 0.6}
    theirs = base.theirs(PROMPT, output_type="latent", generator=seeded(), **asked).images.numpy()
    assert np.abs(base.ours(PROMPT, seed=3, sampler=sampler, **asked).latents - theirs).max() < 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("sampler", ["ddim", "heun", "unipc", "dpmpp-3m-sde", "euler-ancestral"])
def test_one_network_that_hands_over_to_itself_walks_on(base: Pair, sampler: str) -> None:
    """A sampler without a memory draws what it draws in one go; one with a memory, or noise, has as many steps."""
    asked: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": 3.0, "sampler": sampler}
    whole = base.ours(PROMPT, **asked)
    first = base.ours(PROMPT, denoising_end=0.6, **asked)
    second = base.ours(PROMPT, image=first.latents, denoising_start=0.6, **asked)
    assert len(first.timings.step_ms) + len(second.timings.step_ms) == len(whole.timings.step_ms)
    if sampler in ("ddim", "heun"):
        np.testing.assert_allclose(second.pixels, whole.pixels, atol=1e-4)


def test_steps_count_to_where_the_walk_stops(base: Pair) -> None:
    steps = list(base.ours.steps(PROMPT, num_inference_steps=5, denoising_end=0.6))
    assert [(step.index, step.total) for step in steps] == [(0, 3), (1, 3), (2, 3)]


def test_a_part_in_the_middle_can_be_a_third_networks(base: Pair) -> None:
    asked: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 3.0, "sampler": "ddim"}
    state = base.ours(["a cat", "a dog"], denoising_end=0.3, **asked).latents
    state = base.ours(["a cat", "a dog"], image=state, denoising_start=0.3, denoising_end=0.7, **asked).latents
    found = base.ours(["a cat", "a dog"], image=state, denoising_start=0.7, **asked)
    np.testing.assert_allclose(found.pixels, base.ours(["a cat", "a dog"], **asked).pixels, atol=1e-4)


LATENTS = np.zeros((1, 4, 8, 8), np.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"denoising_end": 1.0}, "denoising_end cannot be used. Got: 1.0. Allowed: above 0 and below 1"),
        ({"denoising_start": float("nan"), "image": LATENTS}, "denoising_start cannot be used. Got: nan"),
        ({"denoising_start": 0.8}, "takes what another network left, latents and no picture, as image. Got: NoneType"),
        ({"denoising_start": 0.8, "image": LATENTS[0]}, r"Got: float32 \(4, 8, 8\). Allowed: floats \[images, 4, height, width\]"),
        ({"denoising_start": 0.8, "image": np.full((1, 16, 16, 3), 0.5)}, r"Got: float64 \(1, 16, 16, 3\)"),
        ({"denoising_start": 0.8, "image": LATENTS + np.inf}, "numbers that are not finite"),
        ({"denoising_start": 0.8, "image": LATENTS, "strength": 0.5}, "nothing beside them. Got: denoising_start and strength"),
        ({"denoising_start": 0.8, "image": LATENTS, "latents": LATENTS}, "Got: denoising_start and latents"),
        ({"denoising_start": 0.8, "image": LATENTS, "denoising_end": 0.8}, "ends before it begins. Got: .*start 0.8, denoising_end 0.8"),
        ({"denoising_start": 0.8, "image": np.repeat(LATENTS, 3, 0)}, r"do not fit. Got: \(3, 4, 8, 8\). Allowed: \(1, 4, 8, 8\)"),
        ({"denoising_start": 0.9996, "image": LATENTS}, "Of 4 steps none begins below time step 0"),
        ({"denoising_end": 0.05}, "Of 4 steps none begins at time step 950 or above"),
        ({"denoising_end": 0.5, "sampler": "restart"}, "'restart' cannot begin in the middle, nor stop there"),
        ({"denoising_end": 0.5, "sampler": "pndm:skip_prk_steps=false", "num_inference_steps": 9}, "nor stop there"),
        ({"denoising_end": 0.5, "sampler": "parataa"}, "cannot go with denoising_end"),
        ({"prompt_2": ["a", "b"]}, "A list for prompt_2 has one text per prompt. Got: 2 for 1"),
    ],
)
def test_what_cannot_be_shared_is_refused(base: Pair, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        base.ours(PROMPT, **{"num_inference_steps": 4, **options})


@pytest.mark.parametrize(
    "texts",
    [
        {"prompt_2": "black trousers", "negative_prompt": "a bag", "negative_prompt_2": "shoes"},
        {"prompt_2": "black trousers"},
        {"negative_prompt": "", "negative_prompt_2": "shoes"},
        {"prompt": [PROMPT, "a bag"], "prompt_2": ["black trousers", "blue shoes"], "negative_prompt": ["wool", "bag"]},
    ],
)
def test_each_encoder_reads_its_own_text(base: Pair, texts: dict[str, Any]) -> None:
    asked = {"prompt": PROMPT, "num_inference_steps": 3, "guidance_scale": 4.0, **texts}
    theirs = base.theirs(output_type="np", generator=seeded(), **asked).images
    ours = base.ours(seed=3, **asked)
    assert not ours.warnings
    assert np.abs(ours.pixels - theirs).max() < CLOSE
    same = base.ours(seed=3, **{name: text for name, text in asked.items() if not name.endswith("_2")}).pixels
    assert np.abs(ours.pixels - same).max() > 1e-3


def test_a_text_that_nobody_reads_is_told(base: Pair, refiner: Pair) -> None:
    asked: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 4.0, "negative_prompt": "a bag"}
    found = base.ours(PROMPT, prompt_3="a cat", negative_prompt_3="x", **asked)
    assert found.warnings == ("prompt_3 and negative_prompt_3 without effect: this network has 2 text encoders.",)
    alone = refiner.ours(PROMPT, prompt_2="a cat", image=np.zeros((16, 16, 3)), **{**asked, "num_inference_steps": 2})
    assert alone.warnings == ("prompt_2 without effect: this network has one text encoder.",)
