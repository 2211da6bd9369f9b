"""diffusers' schedulers beside the samplers: which is whose, where they differ and why, and both loops around a toy network."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.runtimes.denoiser import to_x0
from edgediffusion.runtimes.noise import TorchNoise
from edgediffusion.runtimes.samplers import resolve
from edgediffusion.runtimes.schedules import alpha_bars

SHAPE = (2, 3, 4, 4)
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample", "flow": "flow_prediction"}
EVEN = ("leading", "trailing", "linspace")
RAMPS = ("karras", "exponential", "beta")
EULER = (*EVEN, *RAMPS, "karras:ends=leading", "beta:ends=trailing")
LAMBDA = (*EVEN, *RAMPS)
FLOW = ("flow",)

Level = Callable[[float], tuple[float, float]]


@dataclass(frozen=True)
class Peer:
    """A sampler with its options and diffusers' scheduler for it, as far as that goes.

    ``spacings`` are those that the scheduler has, ``flow`` among them for a flow as it comes; ``fewest`` steps it can make.
    ``precise``: its coefficients cancel in float32, so its table of noise levels is made float64. ``tolerance``: times more than
    for others is allowed, where something in float32 is left.
    """

    sampler: str
    scheduler: str
    predictions: tuple[str, ...] = ("epsilon", "v", "sample")
    spacings: tuple[str, ...] = EVEN
    arguments: Mapping[str, Any] = field(default_factory=dict)
    step: Mapping[str, Any] = field(default_factory=dict)
    fewest: int = 1
    precise: bool = False
    tolerance: float = 1.0
    zero_snr: bool = False


def _multistep(sampler: str, **arguments: Any) -> Peer:
    return Peer(sampler, "DPMSolverMultistepScheduler", spacings=(*LAMBDA, *FLOW), arguments=arguments, zero_snr=True)


def _unipc(sampler: str, **arguments: Any) -> Peer:
    zero_snr = "bh1" not in sampler  # else not a number at the end, whatever the spacing
    # B_1(h) is the 14 that a flow's first step takes in lambda, and what it multiplies is small by as much.
    tolerance = 3.0 if "bh1" in sampler else 1.0
    spacings = (*LAMBDA, *FLOW)
    return Peer(
        sampler, "UniPCMultistepScheduler", spacings=spacings, arguments=arguments, precise=True, tolerance=tolerance, zero_snr=zero_snr
    )


_DDIM = {"clip_sample": False, "set_alpha_to_one": False}
SDE = {"algorithm_type": "sde-dpmsolver++"}
DENOISING = (
    Peer("ddim", "DDIMScheduler", arguments=_DDIM, zero_snr=True),
    Peer("ddim:eta=0.7", "DDIMScheduler", arguments=_DDIM, step={"eta": 0.7}, zero_snr=True),
    Peer("ddpm", "DDPMScheduler", arguments={"clip_sample": False}, zero_snr=True),
    Peer("ddpm:variance=large", "DDPMScheduler", arguments={"clip_sample": False, "variance_type": "fixed_large"}, zero_snr=True),
    Peer("lcm", "LCMScheduler", arguments={"clip_sample": False}),
    Peer("pndm", "PNDMScheduler", ("epsilon", "v"), arguments={"skip_prk_steps": True}),
    Peer("pndm:skip_prk_steps=false", "PNDMScheduler", ("epsilon", "v"), arguments={"skip_prk_steps": False}, fewest=4),
    Peer("euler", "EulerDiscreteScheduler", spacings=EULER, zero_snr=True),
    Peer("euler-ancestral", "EulerAncestralDiscreteScheduler", ("epsilon", "v"), zero_snr=True),
    Peer("heun", "HeunDiscreteScheduler", spacings=EULER),
    Peer("dpm2", "KDPM2DiscreteScheduler", ("epsilon", "v"), spacings=EULER),
    Peer("dpm2-ancestral", "KDPM2AncestralDiscreteScheduler", ("epsilon", "v"), spacings=EULER, tolerance=3.0),
    Peer("lms", "LMSDiscreteScheduler", spacings=EULER, precise=True, tolerance=3.0),
    Peer("flow-euler", "FlowMatchEulerDiscreteScheduler", ("flow",), spacings=(*FLOW, *RAMPS)),
    Peer("flow-heun", "FlowMatchHeunDiscreteScheduler", ("flow",), spacings=FLOW),
)
SOLVERS = (
    _multistep("dpmpp-2m"),
    _multistep("dpmpp-2m:order=1", solver_order=1),
    _multistep("dpmpp-2m:kind=heun", solver_type="heun"),
    _multistep("dpmpp-2m:order=3", solver_order=3),
    _multistep("dpmpp-2m-sde", **SDE),
    _multistep("dpmpp-2m-sde:kind=heun", **SDE, solver_type="heun"),
    _multistep("dpmpp-3m-sde:source=diffusers", **SDE, solver_order=3),
    Peer("dpmpp-2s", "DPMSolverSinglestepScheduler", spacings=("linspace", *RAMPS, *FLOW)),
    Peer("deis", "DEISMultistepScheduler", spacings=(*LAMBDA, *FLOW), precise=True),
    Peer("deis:order=3", "DEISMultistepScheduler", spacings=(*LAMBDA, *FLOW), arguments={"solver_order": 3}, precise=True),
    _unipc("unipc"),
    _unipc("unipc:order=3", solver_order=3),
    _unipc("unipc:kind=bh1", solver_type="bh1"),
    _unipc("unipc:kind=bh1,order=3", solver_type="bh1", solver_order=3),
    Peer("sa-solver", "SASolverScheduler", spacings=(*LAMBDA, *FLOW), precise=True),
    Peer(
        "sa-solver:corrector=3,predictor=3",
        "SASolverScheduler",
        spacings=LAMBDA,
        arguments={"predictor_order": 3, "corrector_order": 3},
        precise=True,
    ),
    Peer("sa-solver:corrector=1,predictor=1", "SASolverScheduler", arguments={"predictor_order": 1, "corrector_order": 1}),
)
PEERS = (*DENOISING, *SOLVERS)

STAYS = "diffusers' last step stays at the last noise level, where the state still has its noise"
INFINITE = "B_1(h) = h is infinite in the last step and diffusers multiplies it by zero: not a number"
# Only the calls of the network are compared, not what becomes of the last.
BUT_LAST = {
    **{("deis", spacing): STAYS for spacing in (*RAMPS, *FLOW)},
    **{("sa-solver", spacing): STAYS for spacing in (*RAMPS, *FLOW)},
    **{("unipc:kind=bh1", spacing): INFINITE for spacing in (*LAMBDA, *FLOW)},
}
# Not compared at all; a test says that they do differ.
UNLIKE = {
    ("pndm", "v"): "diffusers extrapolates v, and turns the sum into noise with the alpha and the state of the last call alone",
    ("pndm", "linspace"): "diffusers goes its first step again from train_steps // steps above where the second call lies",
    ("dpm2-ancestral", "2 steps"): "diffusers' s_down^2 = s'^2 - s_up^2 cancels in float32 where a step falls to a hundredth",
}


@dataclass(frozen=True)
class Seen:
    """What the network was asked, call by call, and the state after the last call."""

    inputs: list[np.ndarray]
    timesteps: list[float]
    last: np.ndarray


def unlike(peer: Peer, prediction: str, spacing: str, steps: int) -> bool:
    return any(peer.sampler.startswith(name) and what in (prediction, spacing, f"{steps} steps") for name, what in UNLIKE)


def but_last(peer: Peer, spacing: str) -> bool:
    return any(peer.sampler.startswith(name) and what == spacing for name, what in BUT_LAST)


def network(x: np.ndarray, timestep: float, level: Level, prediction: str) -> np.ndarray:
    """A smooth fake network with an opinion about x_0 (within -3..3), told as any prediction; float32 as a real one."""
    alpha, sigma = level(timestep)
    shift = np.linspace(-1, 1, x.shape[-1], dtype=np.float32)
    x0 = 3 * np.tanh(np.float32(0.3 * alpha) * x + np.float32(0.3 * math.cos(timestep / 200)) * shift)
    if prediction == "sample":
        return x0
    noise = (x - np.float32(alpha) * x0) / np.float32(max(sigma, 0.02))
    return {"epsilon": noise, "v": alpha * noise - sigma * x0, "flow": noise - x0}[prediction].astype(np.float32)


def level_of(schedule: NoiseSchedule) -> Level:
    """Signal and noise at a timestep, as the fake network would know them from its training: of sigma / alpha interpolated."""
    if schedule.kind == "flow":
        return lambda t: (1 - t / schedule.train_steps, t / schedule.train_steps)
    bars = alpha_bars(schedule, end=2.0**-24)
    ratios = np.sqrt((1 - bars) / bars)

    def level(timestep: float) -> tuple[float, float]:
        ratio = float(np.interp(timestep, np.arange(len(ratios)), ratios))
        return 1 / math.sqrt(1 + ratio**2), ratio / math.sqrt(1 + ratio**2)

    return level


def ours(sampler: str, schedule: NoiseSchedule, prediction: str, steps: int) -> Seen:
    _, module = resolve(sampler)
    noise, points, level = TorchNoise(3), module.points(schedule, steps), level_of(schedule)
    inputs: list[np.ndarray] = []

    def denoise(x: np.ndarray, i: int) -> np.ndarray:
        inputs.append(x.copy())
        return to_x0(prediction, x, network(x, points.at[i].timestep, level, prediction), points.at[i])

    *_, last = module.sample(denoise, points.start(noise.normal(SHAPE)), points, noise)
    assert last.dtype == np.float32
    return Seen(inputs, [at.timestep for at in points.at], last)


def theirs(peer: Peer, schedule: NoiseSchedule, prediction: str, steps: int) -> Seen:
    """diffusers' pipeline loop."""
    import torch

    scheduler, level = made(peer, schedule, prediction), level_of(schedule)
    generator = torch.Generator().manual_seed(3)
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else two equal timesteps at the beginning would be taken for one
    if peer.precise:
        scheduler.sigmas = scheduler.sigmas.double()
    x = torch.randn(SHAPE, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
    extra = {**peer.step, **({"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {})}
    inputs, timesteps = [], []
    for timestep in scheduler.timesteps:
        fed = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        inputs.append(fed.numpy().astype(np.float32))
        timesteps.append(float(timestep))
        output = torch.from_numpy(network(inputs[-1], timesteps[-1], level, prediction))
        x = scheduler.step(output, timestep, x, **extra).prev_sample
    return Seen(inputs, timesteps, np.asarray(x.numpy()))


def made(peer: Peer, schedule: NoiseSchedule, prediction: str) -> Any:
    """diffusers' scheduler for a schedule and its spacing. Making one is slow, so one serves all spacings and predictions."""
    scheduler = _made(peer.scheduler, tuple(sorted(peer.arguments.items())), _of_schedule(schedule))
    spacing, _, ends = schedule.spacing.partition(":ends=")
    settings = {
        "prediction_type": PREDICTIONS[prediction],
        "timestep_spacing": spacing if spacing in EVEN else ends or "linspace",
        **{f"use_{ramp}_sigmas": ramp == spacing for ramp in RAMPS},
    }
    known = inspect.signature(type(scheduler)).parameters
    scheduler.register_to_config(**{key: value for key, value in settings.items() if key in known})
    return scheduler


@functools.cache
def _made(kind: str, arguments: tuple[tuple[str, Any], ...], schedule: tuple[tuple[str, Any], ...]) -> Any:
    import diffusers

    known = inspect.signature(getattr(diffusers, kind)).parameters
    return getattr(diffusers, kind)(**{key: value for key, value in schedule if key in known}, **dict(arguments))


def _of_schedule(schedule: NoiseSchedule) -> tuple[tuple[str, Any], ...]:
    own: dict[str, Any] = {"num_train_timesteps": schedule.train_steps, "steps_offset": schedule.steps_offset}
    if schedule.kind == "flow":
        return tuple({**own, "use_flow_sigmas": True, "flow_shift": schedule.shift, "shift": schedule.shift}.items())
    own |= {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end, "beta_schedule": schedule.kind}
    return tuple({**own, **({"rescale_betas_zero_snr": True} if schedule.zero_terminal_snr else {})}.items())


def assert_same_trajectory(
    peer: Peer, schedule: NoiseSchedule, prediction: str, steps: int, tolerance: float, *, spacing: str = ""
) -> None:
    """Of all calls the input and the timestep, and the state after the last one; ``tolerance`` is of the largest value."""
    expected = theirs(peer, schedule, prediction, steps)
    found = ours(peer.sampler, schedule, prediction, steps)
    # Timesteps of noise levels are interpolated in float32 there; 1e-3 of one in a thousand changes nothing here.
    np.testing.assert_allclose(found.timesteps, expected.timesteps, rtol=0, atol=1e-3)
    pairs = [*zip(found.inputs, expected.inputs, strict=True)]
    if not but_last(peer, spacing or schedule.spacing):
        pairs.append((found.last, expected.last))
    for call, (mine, diffusers_own) in enumerate(pairs):
        atol = tolerance * peer.tolerance * np.abs(diffusers_own).max()
        np.testing.assert_allclose(mine, diffusers_own, rtol=0, atol=atol, err_msg=f"{steps} steps, call {call}")
