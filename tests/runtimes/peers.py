"""diffusers' schedulers beside the samplers: which is whose, and one loop for each around the same toy network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.runtimes.denoiser import to_x0
from edgediffusion.runtimes.noise import TorchNoise
from edgediffusion.runtimes.samplers import resolve

SHAPE = (2, 3, 4, 4)
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample", "flow": "flow_prediction"}
EVEN = ("leading", "trailing", "linspace")
RAMPS = ("karras", "exponential", "beta")


@dataclass(frozen=True)
class Peer:
    """A sampler with its options and diffusers' scheduler for it, as far as that goes.

    ``but_last``: spacings for which only the calls of the network are compared, not what comes after the last one.
    """

    sampler: str
    scheduler: str
    predictions: tuple[str, ...] = ("epsilon", "v", "sample")
    spacings: tuple[str, ...] = EVEN
    arguments: Mapping[str, Any] = field(default_factory=dict)
    step: Mapping[str, Any] = field(default_factory=dict)
    fewest: int = 1
    but_last: tuple[str, ...] = ()


@dataclass(frozen=True)
class Seen:
    """What the network was asked, call by call, and the state after the last call."""

    inputs: list[np.ndarray]
    timesteps: list[float]
    last: np.ndarray


def network(x: np.ndarray, timestep: float, level: Callable[[float], tuple[float, float]], prediction: str) -> np.ndarray:
    """A smooth fake network with an opinion about x_0 (within -3..3), told as any prediction; float32 as a real one."""
    alpha, sigma = level(timestep)
    shift = np.linspace(-1, 1, x.shape[-1], dtype=np.float32)
    x0 = 3 * np.tanh(np.float32(0.3 * alpha) * x + np.float32(0.3 * math.cos(timestep / 200)) * shift)
    if prediction == "sample":
        return x0
    noise = (x - np.float32(alpha) * x0) / np.float32(max(sigma, 0.02))
    return {"epsilon": noise, "v": alpha * noise - sigma * x0, "flow": noise - x0}[prediction].astype(np.float32)


def table(bars: np.ndarray) -> Callable[[float], tuple[float, float]]:
    """Signal and noise at any timestep, interpolated in sigma / alpha."""
    ratios = np.sqrt((1 - bars) / np.maximum(bars, 2.0**-24))

    def level(timestep: float) -> tuple[float, float]:
        ratio = float(np.interp(timestep, np.arange(len(ratios)), ratios))
        return 1 / math.sqrt(1 + ratio**2), ratio / math.sqrt(1 + ratio**2)

    return level


def ours(sampler: str, schedule: NoiseSchedule, prediction: str, steps: int, level: Any, shape: tuple[int, ...] = SHAPE) -> Seen:
    _, module = resolve(sampler)
    noise, points = TorchNoise(3), module.points(schedule, steps)
    seen = Seen([], [], np.zeros(0))

    def denoise(x: np.ndarray, i: int) -> np.ndarray:
        at = points.at[i]
        seen.inputs.append(x.copy())
        seen.timesteps.append(at.timestep)
        return to_x0(prediction, x, network(x, at.timestep, level, prediction), at)

    *_, last = module.sample(denoise, points.start(noise.normal(shape)), points, noise)
    assert last.dtype == np.float32
    return Seen(seen.inputs, seen.timesteps, last)


def theirs(scheduler: Any, prediction: str, steps: int, level: Any, step: Mapping[str, Any], shape: tuple[int, ...] = SHAPE) -> Seen:
    """diffusers' pipeline loop."""
    import torch

    generator = torch.Generator().manual_seed(3)
    scheduler.set_timesteps(steps)
    x = torch.randn(shape, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
    takes_generator = "generator" in scheduler.step.__code__.co_varnames
    inputs, timesteps = [], []
    for timestep in scheduler.timesteps:
        fed = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        inputs.append(fed.numpy().copy())
        timesteps.append(float(timestep))
        output = torch.from_numpy(network(fed.numpy().astype(np.float32), float(timestep), level, prediction))
        x = scheduler.step(output, timestep, x, **step, **({"generator": generator} if takes_generator else {})).prev_sample
    return Seen(inputs, timesteps, np.asarray(x.numpy()))


def made(peer: Peer, schedule: NoiseSchedule, prediction: str) -> Any:
    """diffusers' scheduler for a schedule and its spacing."""
    import inspect

    import diffusers

    kind = getattr(diffusers, peer.scheduler)
    if schedule.kind == "flow" and peer.scheduler.startswith("FlowMatch"):
        return kind(shift=schedule.shift, **peer.arguments)
    name, _, ends = schedule.spacing.partition(":ends=")
    settings = {
        "num_train_timesteps": schedule.train_steps,
        "prediction_type": PREDICTIONS[prediction],
        "timestep_spacing": name if name in EVEN else ends or "linspace",
        "steps_offset": schedule.steps_offset,
    }
    if schedule.kind == "flow":
        settings |= {"use_flow_sigmas": True, "flow_shift": schedule.shift}
    else:
        settings |= {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end, "beta_schedule": schedule.kind}
    if schedule.zero_terminal_snr:
        settings["rescale_betas_zero_snr"] = True
    if name in RAMPS:
        settings[f"use_{name}_sigmas"] = True
    known = inspect.signature(kind).parameters
    lacking = [key for key in settings if key not in known and key not in ("timestep_spacing", "steps_offset")]
    assert not lacking, f"{peer.scheduler} has no {lacking}"
    return kind(**{key: value for key, value in settings.items() if key in known}, **peer.arguments)
