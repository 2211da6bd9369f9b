"""A diffusers scheduler as data: the training schedule, what the network predicts, and the sampler that it stands for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import diffusers

from edgediffusion.bundle import DynamicShift, NoiseSchedule
from edgediffusion.errors import ArgumentError, SourceError
from edgediffusion.export.source import Source
from edgediffusion.runtimes.options import choose
from edgediffusion.runtimes.samplers import resolve

# Names of samplers; what is in braces are settings, in the words of the sampler's own options.
SAMPLERS: Mapping[str, str] = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm:variance={variance_type}",
    "PNDMScheduler": "pndm:skip_prk_steps={skip_prk_steps}",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-ancestral",
    "HeunDiscreteScheduler": "heun",
    "KDPM2DiscreteScheduler": "dpm2",
    "KDPM2AncestralDiscreteScheduler": "dpm2-ancestral",
    "LMSDiscreteScheduler": "lms",
    "DPMSolverMultistepScheduler": "dpmpp-2m:order={solver_order},kind={solver_type}",
    "DPMSolverSinglestepScheduler": "dpmpp-2s",
    "DEISMultistepScheduler": "deis:order={solver_order}",
    "UniPCMultistepScheduler": "unipc:order={solver_order},kind={solver_type}",
    "SASolverScheduler": "sa-solver:predictor={predictor_order},corrector={corrector_order}",
    "LCMScheduler": "lcm",
    "FlowMatchEulerDiscreteScheduler": "flow-euler",
    "FlowMatchHeunDiscreteScheduler": "flow-heun",
}
_WORDS = {True: "true", False: "false", "fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large"}
_SETTINGS = re.compile(r"(\w+)=\{(\w+)\}")
_SDE = "sde-dpmsolver++"
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample", "flow_prediction": "flow"}
_KINDS = ("linear", "scaled_linear", "squaredcos_cap_v2")
_CLIPPING = ("DDPMScheduler", "DDIMScheduler")
_RAMPS = ("karras", "exponential", "beta")
# Their ramps run between the noise levels of timestep_spacing; those of the multistep solvers over the whole table.
_RAMP_WITHIN_SPACING = (
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
)
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "trained_betas": (None,),
    "clip_sample": (False,),
    "thresholding": (False,),
    "use_lu_lambdas": (False, None),
    "use_dynamic_shifting": (False,),
    "invert_sigmas": (False,),
    "stochastic_sampling": (False,),
    "shift_terminal": (None, False, 0),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "final_sigmas_type": ("zero",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "lambda_min_clipped": (-float("inf"), None),
    "predict_x0": (True,),
    "disable_corrector": ([],),
    "solver_p": (None,),
    "tau_func": (None,),
    "original_inference_steps": (50,),
}
# What a setting may be for one class, where the sampler has no more of it.
_OWN: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "DDPMScheduler": {"variance_type": ("fixed_small", "fixed_small_log", "fixed_large")},
    "DPMSolverMultistepScheduler": {
        "algorithm_type": ("dpmsolver++", _SDE),
        "solver_order": (1, 2, 3),
        "solver_type": ("midpoint", "heun"),
        "lower_order_final": (True,),
        "variance_type": (None,),
    },
    "DPMSolverSinglestepScheduler": {
        "algorithm_type": ("dpmsolver++",),
        "solver_order": (2,),
        "solver_type": ("midpoint",),
        "variance_type": (None,),
    },
    "DEISMultistepScheduler": {"solver_order": (1, 2, 3), "lower_order_final": (True,)},
    "UniPCMultistepScheduler": {"solver_order": (1, 2, 3), "lower_order_final": (True,)},
    "SASolverScheduler": {
        "algorithm_type": ("data_prediction",),
        "predictor_order": (1, 2, 3),
        "corrector_order": (1, 2, 3),
        "lower_order_final": (True,),
        "variance_type": (None,),
    },
}


@dataclass(frozen=True)
class Scheduler:
    """``sampler`` is a name of the registry ``runtimes.samplers``, with options where it needs some; ``clip`` as in ``bundle.Sampling``."""

    schedule: NoiseSchedule
    prediction: str
    sampler: str
    clip: float | None = None


def read_scheduler(source: Source, *, may_clip: bool = False, **overrides: Any) -> Scheduler:
    """The scheduler of a pipeline; ``overrides`` are settings that the pipeline's class enforces.

    ``may_clip`` says that the family passes on whether estimates of x_0 are clipped, which networks of pixels want.

    Raises:
        SourceError: it is of an unknown class, or does something that the samplers here do not.
    """
    kind = source.require_class("scheduler", tuple(SAMPLERS))
    config = _full_config(kind, source.config("scheduler"))
    config |= {key: value for key, value in overrides.items() if key in config}
    _refuse_unstatable(kind, config, may_clip=may_clip)
    spacing = _spacing(kind, config)
    if kind.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        shift = config["shift"] if kind.startswith("FlowMatch") else config["flow_shift"]
        schedule = NoiseSchedule(kind="flow", train_steps=config["num_train_timesteps"], shift=float(shift))
        if spacing.startswith(_RAMPS):  # a flow has no timesteps that another spacing could pick
            schedule = replace(schedule, spacing=spacing.partition(":")[0])
        return Scheduler(schedule, "flow", _sampler(kind, config))
    schedule = NoiseSchedule(
        kind=config["beta_schedule"],
        train_steps=config["num_train_timesteps"],
        beta_start=config["beta_start"],
        beta_end=config["beta_end"],
        zero_terminal_snr=config.get("rescale_betas_zero_snr", False),
        set_alpha_to_one=config.get("set_alpha_to_one", True),
        spacing=spacing,
        steps_offset=config.get("steps_offset", 0),
    )
    clip = float(config["clip_sample_range"]) if config.get("clip_sample") else None
    return Scheduler(schedule, _PREDICTIONS[config["prediction_type"]], _sampler(kind, config), clip)


def trailing(scheduler: Scheduler) -> NoiseSchedule:
    """The schedule of a pipeline that itself asks FlowMatchEulerDiscreteScheduler for the sigmas 1, 1 - 1 / steps, ..., 1 / steps.

    A scheduler that a pipeline cannot ask so, as those with ``use_flow_sigmas``, keeps its own.
    """
    schedule = scheduler.schedule
    if scheduler.sampler != "flow-euler":
        return schedule
    return replace(schedule, spacing=f"{schedule.spacing}:ends=trailing" if schedule.spacing in _RAMPS else "trailing")


def dynamic_shift(source: Source, token_pixels: int) -> DynamicShift | None:
    """The scheduler's shift by the size of the picture, if it has one; a token is a square of so many pixels a side."""
    config = source.config("scheduler")
    if not config.get("use_dynamic_shifting"):
        return None
    return DynamicShift(
        base=config.get("base_shift", 0.5),
        most=config.get("max_shift", 1.15),
        base_tokens=config.get("base_image_seq_len", 256),
        most_tokens=config.get("max_image_seq_len", 4096),
        token_pixels=token_pixels,
        exponential=config.get("time_shift_type", "exponential") == "exponential",
    )


def scheduler_of(sampler: str, config: Mapping[str, Any]) -> Any:
    """diffusers' scheduler that draws what a sampler draws, with the training schedule of another scheduler's configuration.

    Raises:
        UnknownName: no such sampler. ArgumentError: no scheduler is known for it, or for an option that it has.
    """
    chosen = choose("runtimes.samplers", sampler, kind="sampler")
    name = chosen.text.partition(":")[0]
    texts = {text.partition(":")[0]: (kind, text) for kind, text in SAMPLERS.items()}
    kind, text = texts.get(name.removesuffix("-sde").replace("3m", "2m"), ("", ""))
    keys = dict(_SETTINGS.findall(text))
    odd = [option for option in _differing(chosen.options) if option not in keys]
    if name == "dpmpp-3m-sde":  # of all options the one that is not diffusers' by default
        odd = [] if chosen.options.source == "diffusers" else ["source"]
    if not kind or odd:
        what = f"the option '{odd[0]}' of '{name}'" if odd else f"'{name}'"
        allowed = ", ".join(sorted({*texts, "dpmpp-2m-sde", "dpmpp-3m-sde"}))
        raise ArgumentError(f"diffusers has no scheduler that is known here for {what}", allowed=allowed)
    words = {word: value for value, word in _WORDS.items() if value != "fixed_small_log"}
    settings = {key: getattr(chosen.options, option, None) for option, key in keys.items()}
    settings = {key: words.get(value, value) for key, value in settings.items() if value is not None}
    if name.endswith("-sde"):
        settings |= {"algorithm_type": _SDE} | ({"solver_order": 3} if name.startswith("dpmpp-3m") else {})
    if "shift" in config and not kind.startswith("FlowMatch"):
        settings |= {"use_flow_sigmas": True, "flow_shift": config["shift"], "prediction_type": "flow_prediction"}
    return getattr(diffusers, kind).from_config(dict(config), **settings)


def _differing(options: Any) -> list[str]:
    """Names of the options that are not what they are by default."""
    return [] if options is None else [f.name for f in fields(options) if getattr(options, f.name) != f.default]


def _full_config(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration files of old versions lack settings that have defaults since."""
    return dict(getattr(diffusers, kind).from_config(dict(config)).config)


def _sampler(kind: str, config: Mapping[str, Any]) -> str:
    """The sampler's name with the options that differ from its defaults."""
    text = SAMPLERS[kind]
    if kind == "PNDMScheduler" and config["prediction_type"] != "epsilon":
        text = "ddim"  # diffusers extrapolates v itself there, which 'pndm' does not; DDIM walks the same timesteps
    if config.get("algorithm_type") == _SDE:
        third = config["solver_order"] == 3
        text = "dpmpp-3m-sde:source=diffusers" if third else text.replace("dpmpp-2m", "dpmpp-2m-sde")
    words = {key: _WORDS.get(value, value) for key, value in config.items() if isinstance(value, (str, bool, int))}
    return resolve(text.format_map(words))[0]


def _spacing(kind: str, config: Mapping[str, Any]) -> str:
    even = str(config.get("timestep_spacing", "linspace"))
    ramp = next((name for name in _RAMPS if config.get(f"use_{name}_sigmas")), None)
    if ramp is None:
        return even
    return f"{ramp}:ends={even}" if kind in _RAMP_WITHIN_SPACING and even != "linspace" else ramp


def _refuse_unstatable(kind: str, config: Mapping[str, Any], *, may_clip: bool) -> None:
    flow = bool(config.get("use_flow_sigmas"))
    predictions = tuple(name for name in _PREDICTIONS if (name == "flow_prediction") == flow)
    allowed = {**_PLAIN, **_OWN.get(kind, {}), "beta_schedule": _KINDS, "prediction_type": predictions}
    if may_clip and kind in _CLIPPING:
        allowed["clip_sample"] = (False, True)
    for key, values in allowed.items():
        if key in config and config[key] not in values:
            raise SourceError(
                f"The {kind} of this pipeline has a setting that the samplers here do not follow: {key}",
                got=config[key],
                allowed=", ".join(map(str, values)),
                do="Change it in scheduler/scheduler_config.json if the network draws without it.",
            )
