"""What is asked of a pipeline, and the plan that follows from it: every name resolved and every number checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from edgediffusion.bundle import NoiseSchedule, Sampling
from edgediffusion.errors import ArgumentError
from edgediffusion.runtimes.denoiser import check_folded, check_predictable
from edgediffusion.runtimes.guidance import DynamicThreshold, Guidance, dynamic_threshold, guidance
from edgediffusion.runtimes.samplers import Sampler, resolve
from edgediffusion.runtimes.schedules import Points, respaced


class Options(TypedDict, total=False):
    """The optional fields of ``Request``, for the type checker."""

    negative_prompt: str | Sequence[str]
    num_inference_steps: int | None
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


@dataclass(frozen=True)
class Request:
    """The arguments of a generation, named as in diffusers; None stands for what the bundle recommends.

    A single ``seed`` is one stream of noise for all images, as with one generator in diffusers; a list has one per
    image. ``num_images`` is per prompt. ``latents`` replace the first noise: float [images, channels, height, width].
    ``sampler`` and ``spacing`` are names of their registries, with options where they have some (``ddim:eta=0.5``).
    ``noise`` is a flavour of ``runtimes.noise``. Classifier-free guidance is on between the two noise levels, sigma / alpha,
    of ``guidance_interval``; ``dynamic_threshold`` is a quantile and, if wanted, the largest s: see ``runtimes.guidance``.
    """

    prompt: str | Sequence[str]
    negative_prompt: str | Sequence[str] = ""
    num_inference_steps: int | None = None
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


@dataclass(frozen=True)
class Plan:
    """One entry of ``prompts`` and ``negatives`` per image; ``latent_shape`` is [images, channels, height, width].

    ``points`` has an entry for each call of the network, of which some samplers make several a step. ``spacing`` is empty where
    it is the bundle's own.
    """

    prompts: tuple[str, ...]
    negatives: tuple[str, ...]
    latent_shape: tuple[int, int, int, int]
    sampler_name: str
    sampler: Sampler
    points: Points
    steps: int
    spacing: str
    guidance_scale: float
    classifier_free: bool
    guidance: Guidance
    threshold: DynamicThreshold | None
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
    steps = sampling.steps if request.num_inference_steps is None else request.num_inference_steps
    schedule = respaced(sampling.schedule, request.spacing)
    points = sampler.points(schedule, steps)
    check_predictable(sampling.prediction, points, name)
    check_folded(sampling.folded, points, steps, name)
    scale = sampling.guidance_scale if request.guidance_scale is None else request.guidance_scale
    prompts, negatives = _texts(request)
    return Plan(
        prompts=prompts,
        negatives=negatives,
        latent_shape=(len(prompts), sampling.latent_channels, *_latent_size(request, sampling)),
        sampler_name=name,
        sampler=sampler,
        points=points,
        steps=steps,
        spacing="" if schedule == sampling.schedule else schedule.spacing,
        guidance_scale=scale,
        classifier_free=sampling.guidance == "classifier-free" and scale > 1,
        guidance=guidance(scale, rescale=request.guidance_rescale, interval=request.guidance_interval),
        threshold=None if request.dynamic_threshold is None else dynamic_threshold(request.dynamic_threshold),
        warnings=(*_warnings(request, sampling, scale), *_unspaced(sampler, sampling, schedule, points, steps)),
    )


def _texts(request: Request) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Prompt and negative prompt of each image: all images of the first prompt, then those of the second, and so on."""
    prompts = (request.prompt,) if isinstance(request.prompt, str) else tuple(request.prompt)
    if not prompts:
        raise ArgumentError("The list of prompts is empty", do="Give at least one; it may be an empty text.")
    if request.num_images < 1:
        raise ArgumentError("The number of images per prompt cannot be used", got=request.num_images, allowed="1 and more")
    negatives = (request.negative_prompt,) * len(prompts) if isinstance(request.negative_prompt, str) else tuple(request.negative_prompt)
    if len(negatives) != len(prompts):
        raise ArgumentError("A list of negative prompts has one per prompt", got=f"{len(negatives)} for {len(prompts)} prompts")
    each = range(request.num_images)
    return tuple(p for p in prompts for _ in each), tuple(n for n in negatives for _ in each)


def _latent_size(request: Request, sampling: Sampling) -> tuple[int, int]:
    height, width = (own if asked is None else asked for asked, own in ((request.height, sampling.height), (request.width, sampling.width)))
    if sampling.fixed_size and (height, width) != (sampling.height, sampling.width):
        raise ArgumentError(
            "This network draws one size only",
            got=f"{height} x {width} (height x width)",
            allowed=f"{sampling.height} x {sampling.width}",
            do="Leave the size out, or export with dynamic sizes where the network can do them.",
        )
    multiple = sampling.size_multiple
    if height < multiple or width < multiple or height % multiple or width % multiple:
        near = " x ".join(str(max(multiple, round(size / multiple) * multiple)) for size in (height, width))
        raise ArgumentError(
            "The size of the picture cannot be used",
            got=f"{height} x {width} (height x width)",
            allowed=f"multiples of {multiple}",
            do=f"The nearest is {near}.",
        )
    return height // sampling.downsampling, width // sampling.downsampling


def _warnings(request: Request, sampling: Sampling, scale: float) -> tuple[str, ...]:
    found = []
    if sampling.guidance == "none" and request.guidance_scale is not None:
        found.append("guidance_scale has no effect: this network takes no guidance.")
    if request.negative_prompt and sampling.guidance != "classifier-free":
        found.append("negative_prompt has no effect: it needs classifier-free guidance, which this network does not use.")
    elif request.negative_prompt and scale <= 1:
        found.append(f"negative_prompt has no effect at guidance_scale {scale:g}: it takes a scale above 1.")
    shaped = [name for name in ("guidance_rescale", "guidance_interval") if getattr(request, name)]
    if shaped and (sampling.guidance != "classifier-free" or scale <= 1):
        found.append(f"{' and '.join(shaped)} without effect: that takes classifier-free guidance at a scale above 1.")
    return tuple(found)


def _unspaced(sampler: Sampler, sampling: Sampling, asked: NoiseSchedule, points: Points, steps: int) -> tuple[str, ...]:
    """Some samplers have timesteps of their own, whatever the spacing."""
    if asked == sampling.schedule or points != sampler.points(sampling.schedule, steps):
        return ()
    return (f"spacing {asked.spacing} has no effect: the sampler calls the network at the same points without it.",)
