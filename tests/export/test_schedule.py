"""Schedulers of diffusers as data, and the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest

from edgediffusion.errors import ArgumentError, SourceError
from edgediffusion.export.schedule import SAMPLERS, read_scheduler, scheduler_of
from edgediffusion.export.source import Source
from edgediffusion.registry import names
from edgediffusion.runtimes.samplers import resolve

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
PLAIN = {"clip_sample": False, **BETAS}
SDE = {"algorithm_type": "sde-dpmsolver++"}


def read(folder: Path, kind: str, **settings: Any) -> Any:
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": kind, **settings}))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", kind]}))
    return read_scheduler(Source.open(folder))


@pytest.mark.parametrize(
    ("kind", "settings", "sampler"),
    [
        ("DDIMScheduler", {}, "ddim"),
        ("DDPMScheduler", {}, "ddpm"),
        ("DDPMScheduler", {"variance_type": "fixed_large"}, "ddpm:variance=large"),
        ("PNDMScheduler", {"skip_prk_steps": True}, "pndm"),
        ("PNDMScheduler", {}, "pndm:skip_prk_steps=false"),
        ("PNDMScheduler", {"prediction_type": "v_prediction"}, "ddim"),
        ("HeunDiscreteScheduler", {}, "heun"),
        ("KDPM2DiscreteScheduler", {}, "dpm2"),
        ("KDPM2AncestralDiscreteScheduler", {}, "dpm2-ancestral"),
        ("LMSDiscreteScheduler", {}, "lms"),
        ("DPMSolverMultistepScheduler", {}, "dpmpp-2m"),
        ("DPMSolverMultistepScheduler", {"solver_order": 3, "solver_type": "heun"}, "dpmpp-2m:kind=heun,order=3"),
        ("DPMSolverMultistepScheduler", SDE, "dpmpp-2m-sde"),
        ("DPMSolverMultistepScheduler", {**SDE, "solver_order": 3}, "dpmpp-3m-sde:source=diffusers"),
        ("DPMSolverSinglestepScheduler", {}, "dpmpp-2s"),
        ("DEISMultistepScheduler", {"solver_order": 3}, "deis:order=3"),
        ("UniPCMultistepScheduler", {"solver_type": "bh1"}, "unipc:kind=bh1"),
        ("SASolverScheduler", {"predictor_order": 3}, "sa-solver:predictor=3"),
    ],
)
def test_says_which_sampler_it_is_and_back(tmp_path: Path, kind: str, settings: dict[str, Any], sampler: str) -> None:
    found = read(tmp_path, kind, **PLAIN, **settings)
    assert found.sampler == sampler
    assert resolve(sampler)[0] == sampler
    if sampler != "ddim":
        back = scheduler_of(sampler, diffusers.DDIMScheduler(**PLAIN).config)
        assert type(back).__name__ == kind
        assert {key: back.config[key] for key in settings} == settings


@pytest.mark.parametrize(
    ("kind", "settings", "spacing"),
    [
        ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}, "leading"),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "karras"),
        ("HeunDiscreteScheduler", {"use_beta_sigmas": True, "timestep_spacing": "trailing"}, "beta:ends=trailing"),
        ("DPMSolverMultistepScheduler", {"use_exponential_sigmas": True, "timestep_spacing": "leading"}, "exponential"),
        ("DPMSolverSinglestepScheduler", {}, "linspace"),
    ],
)
def test_spacings(tmp_path: Path, kind: str, settings: dict[str, Any], spacing: str) -> None:
    assert read(tmp_path, kind, **BETAS, **settings).schedule.spacing == spacing


def test_solvers_of_flows(tmp_path: Path) -> None:
    settings = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    found = read(tmp_path, "UniPCMultistepScheduler", **settings)
    assert (found.schedule.kind, found.schedule.shift, found.prediction, found.sampler) == ("flow", 3.0, "flow", "unipc")
    back = scheduler_of("dpmpp-2m", diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    assert {key: back.config[key] for key in settings} == settings


@pytest.mark.parametrize(
    ("kind", "settings", "named"),
    [
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, "final_sigmas_type"),
        ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1}, "lambda_min_clipped"),
        ("DPMSolverSinglestepScheduler", {"solver_order": 3}, "solver_order"),
        ("UniPCMultistepScheduler", {"predict_x0": False}, "predict_x0"),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, "prediction_type"),
        ("DDPMScheduler", {"variance_type": "learned_range"}, "variance_type"),
        ("LMSDiscreteScheduler", {"beta_schedule": "linear", "trained_betas": [0.1, 0.2]}, "trained_betas"),
    ],
)
def test_refuses_what_a_bundle_cannot_state(tmp_path: Path, kind: str, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(SourceError, match=rf"{kind}.*{named}.*Got: .*Allowed: "):
        read(tmp_path, kind, **{**PLAIN, **settings})


@pytest.mark.parametrize(
    ("sampler", "message"), [("ddim:eta=0.5", "option 'eta'"), ("restart", "'restart'.*dpmpp-2m-sde"), ("dpmpp-3m-sde", "option 'source'")]
)
def test_says_what_has_no_scheduler(sampler: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        scheduler_of(sampler, {})


def test_every_text_names_a_sampler() -> None:
    assert {text.partition(":")[0] for text in SAMPLERS.values()} <= set(names("runtimes.samplers"))
