"""FLUX.1: ``dev`` with guidance as a number and a shift by the size of the picture, ``schnell`` without either."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers_tiny
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from transformers_checks import Conformance, check_whole, of_size

from edgediffusion.bundle import Bundle, DynamicShift, NoiseSchedule
from edgediffusion.export.families import family_of, flux
from edgediffusion.export.pictures import Run, asked
from edgediffusion.export.source import Source
from edgediffusion.runtimes import Pipeline
from edgediffusion.runtimes.samplers import flow_euler
from edgediffusion.runtimes.schedules import at_size, respaced


class TestDev(Conformance):
    NAME = "flux-dev"
    CUTS = (*Conformance.CUTS, "single_transformer_blocks.0", "single_transformer_blocks.1")

    def test_facts(self, bundle: Bundle) -> None:
        facts = bundle.sampling
        assert facts is not None
        assert facts.schedule == NoiseSchedule("flow", 1000, spacing="trailing", shift=3.0, dynamic_shift=SHIFT)
        assert (facts.guidance, facts.guidance_width, facts.guidance_scale, facts.size_multiple) == ("embedded", 0, 3.5, 4)
        assert (facts.latent_channels, facts.latent_shift) == (4, 0.1)
        assert {spec.name: spec.shape for spec in bundle.component("transformer").inputs}["guidance"] == ("batch",)
        assert Bundle.open(bundle.path) == bundle  # the shift is read as it was written

    @pytest.mark.parametrize("kind", ["FluxImg2ImgPipeline", "FluxInpaintPipeline"])
    def test_the_same_bundle_draws_from_a_picture_what_diffusers_draws(self, source: Path, bundle: Bundle, kind: str) -> None:
        sized = of_size(bundle, *self.SIZE)
        theirs = getattr(diffusers, kind).from_pretrained(source)
        theirs.set_progress_bar_config(disable=True)
        ours = Pipeline.from_bundle(sized, threads=1)
        mine, other = asked(theirs, ours.sampling, "a bag", Run("flow-euler", 5, 3.5, 3)).draw(ours, theirs)
        assert np.abs(mine - other).max() < 2 / 255

    def test_clip_reads_the_prompt_and_t5_the_second_one(self, source: Path, bundle: Bundle) -> None:
        theirs = diffusers.FluxPipeline.from_pretrained(source)
        theirs.set_progress_bar_config(disable=True)
        ours = Pipeline.from_bundle(of_size(bundle, *self.SIZE), threads=1)
        both: dict[str, Any] = {"prompt_2": "black trousers", "num_inference_steps": 3, "guidance_scale": 3.5}
        sizes = {"height": self.SIZE[0], "width": self.SIZE[1]}
        other = theirs("a bag", output_type="np", generator=torch.Generator().manual_seed(3), **both, **sizes).images
        assert np.abs(ours("a bag", seed=3, **both).pixels - other).max() < 2 / 255


SHIFT = DynamicShift(0.5, 1.15, 256, 4096, token_pixels=4)


@pytest.mark.parametrize("size", [(64, 64), (256, 128), (1024, 1024)])
@pytest.mark.parametrize("exponential", [True, False])
def test_the_shift_follows_from_the_size_as_in_diffusers(size: tuple[int, int], exponential: bool) -> None:
    kind = "exponential" if exponential else "linear"
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    mu = calculate_shift(size[0] * size[1] // 16)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / 7, 7), mu=mu)
    schedule = NoiseSchedule("flow", 1000, spacing="trailing", dynamic_shift=DynamicShift(0.5, 1.15, 256, 4096, 4, exponential))
    sized = at_size(schedule, *size)
    assert sized.shift == pytest.approx(math.exp(mu) if exponential else mu)
    sigmas = [point.sigma for point in flow_euler.points(sized, 7).at]
    np.testing.assert_allclose(sigmas, theirs.sigmas[:-1].numpy(), rtol=3e-7)  # which are float32


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder: Path = transformers_tiny.write("flux-schnell", tmp_path_factory.mktemp("pipeline") / "schnell")
    return Source.open(folder)


def test_schnell_takes_no_guidance_and_has_no_shift(schnell: Source) -> None:
    assert family_of(schnell)[0] == "flux"
    facts = flux.sampling(schnell)
    assert facts.schedule == NoiseSchedule("flow", 1000, spacing="trailing", shift=1.0)
    assert (facts.guidance, facts.steps) == ("none", 4)
    (part,) = (part for part in flux.parts(schnell) if part.role == "denoise")
    assert "guidance" not in [tensor.name for tensor in part.inputs]


def test_schnell_reads_half_the_text_and_draws_what_diffusers_draws(schnell: Source, tmp_path: Path) -> None:
    bundle = check_whole(schnell.path, tmp_path / "bundle", size=(16, 24))
    tokenizers = [component.tokenizer for component in bundle.with_role("encode")]
    assert [tokenizer.length for tokenizer in tokenizers if tokenizer is not None] == [16, 256]
    assert [spec.shape[1] for spec in bundle.component("transformer").inputs if spec.name == "encoder_hidden_states"] == [256]


@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
def test_a_ramp_runs_between_the_sigmas_that_the_pipeline_asks_for(spacing: str) -> None:
    options: dict[str, Any] = {f"use_{spacing}_sigmas": True}
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0, **options)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / 6, 6))
    ours = flow_euler.points(respaced(NoiseSchedule("flow", 1000, spacing="trailing"), spacing), 6)
    np.testing.assert_allclose([point.sigma for point in ours.at], theirs.sigmas[:-1].numpy(), rtol=1e-6)
