"""A walk that two networks share: one denoises down to some time step, and the other from there, as SDXL's base and refiner do.

Expert denoisers for parts of the noise are Balaji et al.'s (2022, 2211.01324). Arguments are diffusers', and mean the same: fractions of
the training time steps, counted from the noise. A step that begins at ``train_steps * (1 - fraction)`` or above is the first
network's, any other the second's; a step of two calls is done whole by the one that begins it. What is handed over are
latents as they are at that point, which are given no further noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from edgediffusion.bundle import Sampling
from edgediffusion.errors import ArgumentError
from edgediffusion.runtimes import walks
from edgediffusion.runtimes.samplers import Sampler
from edgediffusion.runtimes.schedules import Points

if TYPE_CHECKING:
    from edgediffusion.runtimes.loop import Loop, Step
    from edgediffusion.runtimes.request import Request


@dataclass(frozen=True)
class Share:
    """The part of a walk that is done: the time steps below ``start`` that are not below ``end``; None where there is no such limit."""

    start: int | None = None
    end: int | None = None

    def skipped(self, points: Points, steps: int, name: str, sampler: Sampler) -> int:
        """How many of the first steps are another network's.

        Raises:
            ArgumentError: all of them, or a sampler that cannot begin in the middle.
        """
        if self.start is None:
            return 0
        skipped = walks.steps_above(self.start, points, steps, name, sampler)
        if skipped == steps:
            raise ArgumentError(
                f"Of {steps} steps none begins below time step {self.start}", do="Take more steps, or a lower denoising_start."
            )
        return skipped

    def calls(self, points: Points, steps: int, name: str, sampler: Sampler) -> int:
        """How many calls of the network are done of a walk whose steps above ``start`` are left out already.

        Raises:
            ArgumentError: none, or a sampler that cannot stop in the middle.
        """
        if self.end is None:
            return len(points)
        done = walks.steps_above(self.end, points, steps, name, sampler)
        if not done:
            raise ArgumentError(
                f"Of {steps} steps none begins at time step {self.end} or above", do="Take more steps, or a higher denoising_end."
            )
        return len(points) if done == steps else walks.first_calls(points, steps, name, sampler)[done]


def share(request: Request, sampling: Sampling) -> Share:
    """What a request says of its part of the walk.

    Raises:
        ArgumentError: a fraction out of range, a start that is not above the end, a schedule without training time steps, or what
        cannot go with a start, which takes latents as ``image``.
    """
    given = {name: getattr(request, name) for name in ("denoising_start", "denoising_end")}
    asked = {name: fraction for name, fraction in given.items() if fraction is not None}
    for name, fraction in asked.items():
        if not 0 < fraction < 1:
            raise ArgumentError(f"{name} cannot be used", got=fraction, allowed="above 0 and below 1; 0.8 is usual")
    if asked and sampling.schedule.kind == "flow":
        raise ArgumentError(
            "A walk is shared by training time steps, which a flow does not have", got=" and ".join(asked), do="Leave that out."
        )
    if len(asked) == 2 and given["denoising_start"] >= given["denoising_end"]:
        told = ", ".join(f"{name} {fraction:g}" for name, fraction in asked.items())
        raise ArgumentError("A part of a walk that ends before it begins", got=told, allowed="a start below the end")
    if request.denoising_start is not None:
        _check_start(request, sampling)
    total = sampling.schedule.train_steps
    start, end = (None if fraction is None else round(total - fraction * total) for fraction in given.values())
    return Share(start, end)


def size(request: Request, sampling: Sampling) -> tuple[int, int] | None:
    """Height and width in pixels of what was handed over, if anything was."""
    if request.denoising_start is None:
        return None
    height, width = request.image.shape[2:]
    return height * sampling.downsampling, width * sampling.downsampling


def state(latents: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """What was handed over as the state of a loop, float32 of this shape: one for each image, or one for all of them.

    Raises:
        ArgumentError: latents of another number or size.
    """
    if latents.shape[1:] != shape[1:] or len(latents) not in (1, shape[0]):
        raise ArgumentError("The latents that were handed over do not fit", got=latents.shape, allowed=f"{shape}, or one for all images")
    return np.broadcast_to(latents, shape).astype(np.float32)


def until(loop: Loop, calls: int) -> Iterator[Step]:
    """The first ``calls`` states of a loop. The sampler does not know that it is stopped: it does nothing for an end that is none."""
    return (replace(step, total=calls) for step in islice(loop, calls))


def _check_start(request: Request, sampling: Sampling) -> None:
    useless = [name for name in ("strength", "mask_image", "latents") if getattr(request, name) is not None]
    if useless:
        raise ArgumentError(
            "A walk that begins where another network stopped takes that network's latents as image, and nothing beside them",
            got=" and ".join(["denoising_start", *useless]),
            do="Leave one of them out.",
        )
    latents: Any = request.image
    if (
        not isinstance(latents, np.ndarray)
        or latents.ndim != 4
        or latents.dtype.kind != "f"
        or latents.shape[1] != sampling.latent_channels
    ):
        raise ArgumentError(
            "denoising_start takes what another network left, latents and no picture, as image",
            got=f"{latents.dtype} {latents.shape}" if isinstance(latents, np.ndarray) else type(latents).__name__,
            allowed=f"floats [images, {sampling.latent_channels}, height, width]: Result.latents of a call with denoising_end",
            do="Give those, or strength for a picture.",
        )
    if not np.isfinite(latents).all():
        raise ArgumentError("The latents that were handed over have numbers that are not finite")
