"""What of a request does nothing, told as warnings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgediffusion.bundle import NoiseSchedule, Sampling
from edgediffusion.runtimes.painting import Painting
from edgediffusion.runtimes.samplers import Sampler
from edgediffusion.runtimes.schedules import Points

if TYPE_CHECKING:
    from edgediffusion.runtimes.request import Request

_NEGATIVES = ("negative_prompt", "negative_prompt_2", "negative_prompt_3")


def guided(request: Request, sampling: Sampling, scale: float) -> tuple[str, ...]:
    """Of guidance, by a network or at a scale that has none."""
    found = []
    if sampling.guidance == "none" and request.guidance_scale is not None:
        found.append("guidance_scale has no effect: this network takes no guidance.")
    for name in (name for name in _NEGATIVES if getattr(request, name)):
        if sampling.guidance != "classifier-free":
            found.append(f"{name} has no effect: it needs classifier-free guidance, which this network does not use.")
        elif scale <= 1:
            found.append(f"{name} has no effect at guidance_scale {scale:g}: it takes a scale above 1.")
    shaped = [name for name in ("guidance_rescale", "guidance_interval") if getattr(request, name)]
    if shaped and (sampling.guidance != "classifier-free" or scale <= 1):
        found.append(f"{' and '.join(shaped)} without effect: that takes classifier-free guidance at a scale above 1.")
    return tuple(found)


def unspaced(sampler: Sampler, own: NoiseSchedule, asked: NoiseSchedule, points: Points, steps: int) -> tuple[str, ...]:
    """Some samplers have timesteps of their own, whatever the spacing. ``own`` is the bundle's schedule."""
    if asked == own or asked.spacing.startswith(("timesteps", "sigmas")) or points != sampler.points(own, steps):
        return ()
    return (f"spacing {asked.spacing} has no effect: the sampler calls the network at the same points without it.",)


def repainted(request: Request, painted: Painting | None, size: tuple[int, int]) -> tuple[str, ...]:
    """What happens to pictures that are painted over, or does not for lack of one."""
    if painted is None:
        return ("strength has no effect: it needs a picture to start from.",) if request.strength is not None else ()
    if painted.size == size:
        return ()
    before, after = (f"{height} x {width}" for height, width in (painted.size, size))
    return (f"The picture of {before} was resized to {after} (height x width).",)


def unread(request: Request, encoders: int) -> tuple[str, ...]:
    """Texts for encoders that there are not."""
    names = [f"{kind}_{k}" for k in (2, 3) if k > encoders for kind in ("prompt", "negative_prompt")]
    given = [name for name in names if getattr(request, name) is not None]
    has = "one text encoder" if encoders == 1 else f"{encoders} text encoders" if encoders else "no text encoder"
    return (f"{' and '.join(given)} without effect: this network has {has}.",) if given else ()
