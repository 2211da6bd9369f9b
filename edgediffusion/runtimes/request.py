"""What is asked of a pipeline, and the plan that follows from it: every name resolved and every number checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypedDict

import numpy as np

from edgediffusion.bundle import NoiseSchedule, Sampling
from edgediffusion.errors import ArgumentError, UnknownName
from edgediffusion.runtimes import caching, handover, no_effect, subject
from edgediffusion.runtimes.control import Control
from edgediffusion.runtimes.denoiser import check_folded, check_predictable
from edgediffusion.runtimes.guidance import Clip, Guidance, Threshold, dynamic_threshold, guidance
from edgediffusion.runtimes.network import Policy
from edgediffusion.runtimes.painting import Painting, painting
from edgediffusion.runtimes.samplers import Sampler, resolve
from edgediffusion.runtimes.schedules import Points, at_size, respaced
from edgediffusion.runtimes.subject import Texts
from edgediffusion.runtimes.time_ids import time_ids, without_effect
from edgediffusion.runtimes.walks import later

GUIDANCE_BATCHES = ("joint", "separate")


class Options(TypedDict, total=False):
    """The optional fields of ``Request``, for the type checker."""

    prompt_2: str | Sequence[str] | None
    prompt_3: str | Sequence[str] | None
    negative_prompt: str | Sequence[str] | None
    negative_prompt_2: str | Sequence[str] | None
    negative_prompt_3: str | Sequence[str] | None
    prompt_weights: bool
    class_labels: int | Sequence[int] | None
    image: Any
    mask_image: Any
    strength: float | None
    denoising_start: float | None
    denoising_end: float | None
    num_inference_steps: int | None
    timesteps: Sequence[float] | None
    guidance_scale: float | None
    guidance_rescale: float
    guidance_interval: Sequence[float] | None
    dynamic_threshold: Sequence[float] | None
    height: int | None
    width: int | None
    seed: int | Sequence[int]
    sampler: str | None
    spacing: str | None
    num_images: int
    latents: np.ndarray | None
    noise: str
    cache: str | Policy | None
    tile: int | None
    guidance_batch: str
    original_size: Sequence[float] | None
    crops_coords_top_left: Sequence[float] | None
    target_size: Sequence[float] | None
    negative_original_size: Sequence[float] | None
    negative_crops_coords_top_left: Sequence[float] | None
    negative_target_size: Sequence[float] | None
    aesthetic_score: float
    negative_aesthetic_score: float
    control_image: Any
    controlnet_conditioning_scale: float | Sequence[float]
    control_guidance_start: float | Sequence[float]
    control_guidance_end: float | Sequence[float]
    guess_mode: bool


@dataclass(frozen=True)
class Request:
    """The arguments of a generation, named as in diffusers; None stands for what the bundle recommends.

    A single ``seed`` is one stream of noise for all images, as with one generator in diffusers; a list has one per
    image. ``num_images`` is per prompt. ``latents`` replace the first noise: float [images, channels, height, width].
    ``sampler`` and ``spacing`` are names of their registries, with options where they have some (``ddim:eta=0.5``).
    ``timesteps`` lists training timesteps instead, one a step; of a flow sigma times ``train_steps``.
    ``noise`` is a flavour of ``runtimes.noise``. Classifier-free guidance is on between the two noise levels, sigma / alpha,
    of ``guidance_interval``; ``dynamic_threshold`` is a quantile and, if wanted, the largest s: see ``runtimes.guidance``.
    ``cache`` is a policy of ``runtimes.caching``, by name with options or itself; ``none`` for none at all.

    ``prompt_2`` and ``prompt_3`` are for the second and third of a network's text encoders, in the order of the bundle; each is ``prompt``
    where it is not given, and so with the negative ones. ``denoising_start`` and ``denoising_end`` share a walk between two networks, the
    later of which is given the other's latents as ``image``: see ``runtimes.handover``.

    A network without text needs no ``prompt``; ``class_labels`` are for one that takes them, an int for all images, or one per
    prompt. ``prompt_weights`` reads brackets as weights, see ``runtimes.prompt_weights``. ``image`` and ``mask_image`` are one
    picture for all prompts or one per prompt, see ``runtimes.images`` and ``runtimes.painting``; the size is then the picture's,
    unless ``height`` and ``width`` say otherwise. ``tile`` is the side in pixels of what the autoencoder sees at a time.
    ``original_size`` and what is below it, down to the scores, is what some networks are told of sizes: see ``runtimes.time_ids``.
    ``control_image`` leads a network with a ControlNet, between two parts of its calls: see ``runtimes.control``. It is as ``image``
    is; for several ControlNets it is a list with one such for each, and numbers may be lists.
    ``guidance_batch`` is ``joint``, both rows of classifier-free guidance in one call, or ``separate``, which takes half the memory.
    """

    prompt: str | Sequence[str] | None = None
    prompt_2: str | Sequence[str] | None = None
    prompt_3: str | Sequence[str] | None = None
    negative_prompt: str | Sequence[str] | None = None
    negative_prompt_2: str | Sequence[str] | None = None
    negative_prompt_3: str | Sequence[str] | None = None
    prompt_weights: bool = False
    class_labels: int | Sequence[int] | None = None
    image: Any = None
    mask_image: Any = None
    strength: float | None = None
    denoising_start: float | None = None
    denoising_end: float | None = None
    num_inference_steps: int | None = None
    timesteps: Sequence[float] | None = None
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    guidance_interval: Sequence[float] | None = None
    dynamic_threshold: Sequence[float] | None = None
    height: int | None = None
    width: int | None = None
    seed: int | Sequence[int] = 0
    sampler: str | None = None
    spacing: str | None = None
    num_images: int = 1
    latents: np.ndarray | None = None
    noise: str = "torch"
    cache: str | Policy | None = None
    tile: int | None = None
    guidance_batch: str = "joint"
    original_size: Sequence[float] | None = None
    crops_coords_top_left: Sequence[float] | None = None
    target_size: Sequence[float] | None = None
    negative_original_size: Sequence[float] | None = None
    negative_crops_coords_top_left: Sequence[float] | None = None
    negative_target_size: Sequence[float] | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5
    control_image: Any = None
    controlnet_conditioning_scale: float | Sequence[float] = 1.0
    control_guidance_start: float | Sequence[float] = 0.0
    control_guidance_end: float | Sequence[float] = 1.0
    guess_mode: bool = False


@dataclass(frozen=True)
class Plan:
    """One entry of ``prompts``, ``negatives`` and ``labels`` per image; ``latent_shape`` is [images, channels, height, width].

    A prompt has a text for each of up to three text encoders. ``labels`` are empty where none were given.

    ``time_ids`` are a row of them, and the unconditional one; empty where the network takes none.

    ``points`` has an entry for each call of the network, of which some samplers make several a step; the first ``calls`` are done. They
    begin in another network's latents if ``handed_over``. ``spacing`` is empty where it is the bundle's own.
    """

    prompts: tuple[Texts, ...]
    negatives: tuple[Texts, ...]
    labels: tuple[int, ...]
    painting: Painting | None
    latent_shape: tuple[int, ...]
    sampler_name: str
    sampler: Sampler
    points: Points
    calls: int
    handed_over: bool
    steps: int
    spacing: str
    guidance_scale: float
    classifier_free: bool
    guidance: Guidance
    threshold: Threshold | None
    cache: Policy | None
    tile: int | None
    separate: bool
    time_ids: tuple[tuple[float, ...], ...]
    control: Control
    warnings: tuple[str, ...]

    @property
    def images(self) -> int:
        return len(self.prompts)


def plan(request: Request, sampling: Sampling) -> Plan:
    """Settle a request.

    Raises:
        ArgumentError: a size, a number of steps or of texts that cannot be used, an option that a sampler or spacing
        does not have. UnknownName: no such sampler or spacing.
    """
    name, sampler = resolve(request.sampler or sampling.sampler)
    steps, spacing = _steps(request, sampling)
    part = handover.share(request, sampling)
    painted = painting(request.image, request.mask_image, request.strength) if part.start is None else None
    control = _control(request)
    shown = painted.size if painted is not None else handover.size(request, sampling) or control.size
    height, width = subject.size(request, sampling, shown)
    own = at_size(sampling.schedule, height, width)
    schedule = respaced(own, spacing)
    walk = _points(sampler, schedule, steps)
    _refuse_other_timesteps(request, walk, name)
    skipped = part.skipped(walk, steps, name, sampler) if painted is None else painted.skipped(steps, is_flow=schedule.kind == "flow")
    points = later(walk, steps, skipped, name, sampler)
    check_predictable(sampling.prediction, points, name)
    check_folded(sampling.folded, points, steps, name)
    scale = sampling.guidance_scale if request.guidance_scale is None else request.guidance_scale
    prompts, negatives = subject.texts(request)
    subject.check_tile(request.tile, sampling)
    _check_guidance_batch(request.guidance_batch)
    return Plan(
        prompts=prompts,
        negatives=negatives,
        labels=subject.labels(request, sampling, len(prompts)),
        painting=painted,
        latent_shape=(len(prompts), sampling.latent_channels, height // sampling.downsampling, width // sampling.downsampling),
        sampler_name=name,
        sampler=sampler,
        points=points,
        calls=part.calls(points, steps - skipped, name, sampler),
        handed_over=part.start is not None,
        steps=steps,
        spacing="" if schedule == own else schedule.spacing,
        guidance_scale=scale,
        classifier_free=sampling.guidance == "classifier-free" and scale > 1,
        guidance=guidance(scale, rescale=request.guidance_rescale, interval=request.guidance_interval),
        threshold=_threshold(request, sampling),
        cache=None if request.cache is None else caching.resolve(request.cache),
        tile=request.tile,
        separate=request.guidance_batch == "separate",
        time_ids=time_ids(request, sampling, (height, width)),
        control=control,
        warnings=(
            *no_effect.guided(request, sampling, scale),
            *no_effect.unspaced(sampler, own, schedule, walk, steps),
            *no_effect.repainted(request, painted, (height, width)),
            *without_effect(request, sampling),
        ),
    )


def _control(request: Request) -> Control:
    return Control(
        request.control_image,
        request.controlnet_conditioning_scale,
        request.control_guidance_start,
        request.control_guidance_end,
        request.guess_mode,
    )


@lru_cache(maxsize=16)
def _points(sampler: Sampler, schedule: NoiseSchedule, steps: int) -> Points:
    """Made once for pictures that are drawn alike: a table of all training steps is behind it."""
    return sampler.points(schedule, steps)


def _steps(request: Request, sampling: Sampling) -> tuple[int, str | None]:
    """The number of steps and the spacing that are asked for; a list of timesteps is a spacing."""
    if request.timesteps is None:
        return sampling.steps if request.num_inference_steps is None else request.num_inference_steps, request.spacing
    if request.spacing is not None:
        raise ArgumentError(
            "A picture is drawn either with a spacing or at listed timesteps", got=f"spacing {request.spacing} and timesteps"
        )
    if not len(request.timesteps):
        raise ArgumentError("The list of timesteps is empty", do="Give one for each step, from the largest down.")
    is_flow = sampling.schedule.kind == "flow"
    listed = [float(t) / sampling.schedule.train_steps if is_flow else float(t) for t in request.timesteps]
    steps = len(listed) if request.num_inference_steps is None else request.num_inference_steps
    return steps, f"{'sigmas' if is_flow else 'timesteps'}:at={'/'.join(map(repr, listed))}"


def _refuse_other_timesteps(request: Request, points: Points, sampler: str) -> None:
    """Some samplers have timesteps of their own; others may round those that are listed."""
    called = [point.timestep for point in points.at]
    lacking = [t for t in request.timesteps or () if min(abs(t - other) for other in called) > 1]
    if lacking:
        raise ArgumentError(f"The sampler '{sampler}' has timesteps of its own, and calls the network at none near {lacking[0]:g}")


def _threshold(request: Request, sampling: Sampling) -> Threshold | None:
    if request.dynamic_threshold is not None:
        return dynamic_threshold(request.dynamic_threshold)
    return None if sampling.clip is None else Clip(sampling.clip)


def _check_guidance_batch(name: str) -> None:
    if name not in GUIDANCE_BATCHES:
        raise UnknownName("way to batch guidance", name, GUIDANCE_BATCHES)
