"""A diffusers scheduler as data: the training schedule, what the network predicts, and the sampler that it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.errors import SourceError
from edgediffusion.export.source import Source

# PNDM has no sampler of its own here; DDIM walks the same timesteps of the same schedule.
SAMPLERS = {
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-ancestral",
    "DPMSolverMultistepScheduler": "dpmpp-2m",
    "LCMScheduler": "lcm",
    "FlowMatchEulerDiscreteScheduler": "flow-euler",
}
CLASSES = {sampler: kind for kind, sampler in SAMPLERS.items() if kind != "PNDMScheduler"}  # the way back
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
_KINDS = ("linear", "scaled_linear", "squaredcos_cap_v2")
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "trained_betas": (None,),
    "clip_sample": (False,),
    "thresholding": (False,),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_flow_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_dynamic_shifting": (False,),
    "invert_sigmas": (False,),
    "stochastic_sampling": (False,),
    "shift_terminal": (None, False, 0),
    "interpolation_type": ("linear",),
    "final_sigmas_type": ("zero",),
    "algorithm_type": ("dpmsolver++",),
    "solver_order": (2,),
    "solver_type": ("midpoint",),
    "original_inference_steps": (50,),
}


@dataclass(frozen=True)
class Scheduler:
    """``sampler`` is a name of the registry ``runtimes.samplers``."""

    schedule: NoiseSchedule
    prediction: str
    sampler: str


def read_scheduler(source: Source, **overrides: Any) -> Scheduler:
    """The scheduler of a pipeline; ``overrides`` are settings that the pipeline's class enforces.

    Raises:
        SourceError: it is of an unknown class, or does something that the samplers here do not.
    """
    kind = source.require_class("scheduler", tuple(SAMPLERS))
    config = _full_config(kind, source.config("scheduler"))
    config |= {key: value for key, value in overrides.items() if key in config}
    _refuse_unstatable(kind, config)
    if kind.startswith("FlowMatch"):
        schedule = NoiseSchedule(kind="flow", train_steps=config["num_train_timesteps"], shift=float(config["shift"]))
        return Scheduler(schedule, "flow", SAMPLERS[kind])
    schedule = NoiseSchedule(
        kind=config["beta_schedule"],
        train_steps=config["num_train_timesteps"],
        beta_start=config["beta_start"],
        beta_end=config["beta_end"],
        zero_terminal_snr=config.get("rescale_betas_zero_snr", False),
        set_alpha_to_one=config.get("set_alpha_to_one", True),
        spacing=config["timestep_spacing"],
        steps_offset=config["steps_offset"],
    )
    return Scheduler(schedule, _PREDICTIONS[config["prediction_type"]], SAMPLERS[kind])


def _full_config(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration files of old versions lack settings that have defaults since."""
    return dict(getattr(diffusers, kind).from_config(dict(config)).config)


def _refuse_unstatable(kind: str, config: Mapping[str, Any]) -> None:
    allowed = {**_PLAIN, "beta_schedule": _KINDS, "prediction_type": tuple(_PREDICTIONS)}
    for key, values in allowed.items():
        if key in config and config[key] not in values:
            raise SourceError(
                f"The {kind} of this pipeline has a setting that the samplers here do not follow: {key}",
                got=config[key],
                allowed=", ".join(map(str, values)),
                do="Change it in scheduler/scheduler_config.json if the network draws without it.",
            )
