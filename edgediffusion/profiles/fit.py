"""Whether a bundle fits a target and how fast it should be, before anything is built: from its graphs and the target's facts alone.

What is traded until it fits, in this order, each on top of those before:

    1. One stage in memory at a time: the encoders are unloaded after encoding, the denoiser before decoding.
    2. Lower precision: float16 graphs where the target has kernels for them, then an int8 denoiser.
    3. The decoder sees tiles of the picture, of half its longer side, then of a quarter, where it is the decoder that does not fit.
    4. Fewer pictures at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from edgediffusion.bundle import Bundle, Sampling
from edgediffusion.errors import ArgumentError
from edgediffusion.profiles.fit_needs import ROLES, Arrangement, ComponentFit, Needs, Picture
from edgediffusion.targets import Target
from edgediffusion.targets import fit as facts
from edgediffusion.targets.fit import Processor

_TILE_LATENTS = 4  # a tile is a multiple of so many latent pixels, as ``run --tile`` has it


@dataclass(frozen=True)
class Tried:
    """One way to run it: what is traded, bytes of the process, seconds of a picture."""

    name: str
    needed_bytes: int
    picture_s: float
    fits: bool


@dataclass(frozen=True)
class Fit:
    """``components`` are as the last of ``tried`` leaves them, which is the first that fits, if any does.

    ``step_s`` is one step of the denoiser for ``batch`` pictures, ``picture_s`` one picture. ``available_bytes`` is what there is,
    ``smallest_target`` the least that would do, where this one does not. ``known_error`` is what the estimate was off by where it was
    checked, by what was checked; ``missing`` are facts that no page confirms.
    """

    target: str
    height: int
    width: int
    steps: int
    batch: int
    components: tuple[ComponentFit, ...]
    idle_bytes: int
    step_s: float
    picture_s: float
    needed_bytes: int
    available_bytes: int
    fits: bool
    tried: tuple[Tried, ...]
    smallest_target: str | None
    known_error: Mapping[str, str]
    unverified: tuple[str, ...]


def fit(
    bundle: Bundle,
    target: Target,
    *,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    batch: int = 1,
    guidance: bool | None = None,
    max_memory: int | None = None,
    processor: Processor | None = None,
    progress: Callable[[str, float], None] = lambda label, part: None,
) -> Fit:
    """Estimate memory and time of a bundle on a target, and trade until it fits.

    What is left out is the bundle's own; ``guidance`` says whether guidance doubles the rows. ``max_memory`` is in bytes, by default all
    that the target has. ``processor`` is what was measured of a processor whose file has no figures (``fit_machine.processor_of``).

    Raises:
        ArgumentError: the target's file lacks facts, the bundle is no pipeline, or it cannot be drawn so.
        EngineError: a graph cannot be read, or its sizes cannot be told.
    """
    needs = Needs(bundle, target, processor)
    first = Arrangement(_picture(bundle, height, width, steps, batch, guidance))
    available = max_memory if max_memory is not None else facts.memory_bytes(target, processor)
    tried: list[Tried] = []
    for name, way in _ways(needs, bundle.sampling, first, available):
        progress(name, len(tried) / (len(tried) + 2))
        parts = needs.components(way)
        total = needs.total_bytes(parts, way)
        tried.append(Tried(name, total, needs.seconds(parts, way), total <= available))
        if tried[-1].fits:
            break
    steps_s = [part.seconds for part in parts if part.role == "denoise"]
    larger = None
    if not tried[-1].fits and target.device != "cpu":  # a file for processors says nothing of memory
        larger = facts.smallest_with(tried[-1].needed_bytes, device=target.device, architecture=target.architecture)
    return Fit(
        target=target.name,
        height=way.picture.height,
        width=way.picture.width,
        steps=way.picture.steps,
        batch=way.picture.batch,
        components=parts,
        idle_bytes=facts.idle_bytes(target),
        step_s=sum(steps_s) / max(1, len(steps_s)),
        picture_s=tried[-1].picture_s,
        needed_bytes=tried[-1].needed_bytes,
        available_bytes=available,
        fits=tried[-1].fits,
        tried=tuple(tried),
        smallest_target=None if larger is None else larger.name,
        known_error=facts.known_error(target),
        unverified=tuple(name for name in target.unverified if name.partition(".")[0] in ("memory_gb", "bandwidth_gb_s", "peak_tops")),
    )


def _picture(bundle: Bundle, height: int | None, width: int | None, steps: int | None, batch: int, guidance: bool | None) -> Picture:
    sampling = bundle.sampling
    if sampling is None or not bundle.with_role("denoise"):
        raise ArgumentError("The bundle does not say how it is drawn from", do="An estimate takes a bundle of a whole pipeline.")
    found = Picture(
        height=sampling.height if height is None else height,
        width=sampling.width if width is None else width,
        steps=sampling.steps if steps is None else steps,
        batch=batch,
        guided=sampling.guidance == "classifier-free" and guidance is not False,
    )
    if guidance and not found.guided:
        raise ArgumentError("This pipeline has no guidance that doubles the rows", got=sampling.guidance, do="Leave --guidance out.")
    _check(found, sampling)
    return found


def _check(picture: Picture, sampling: Sampling) -> None:
    unit = sampling.size_multiple
    for name, size, own in (("height", picture.height, sampling.height), ("width", picture.width, sampling.width)):
        if sampling.fixed_size and size != own:
            raise ArgumentError(f"This pipeline draws one {name} only", got=size, allowed=str(own))
        if size < 1 or size % unit:
            raise ArgumentError(f"The {name} cannot be drawn", got=size, allowed=f"multiples of {unit}")
    for name, count in (("steps", picture.steps), ("batch", picture.batch)):
        if count < 1:
            raise ArgumentError(f"'{name}' is too small", got=count, allowed="1 and more")


def _ways(needs: Needs, sampling: Sampling | None, first: Arrangement, available: int) -> Iterator[tuple[str, Arrangement]]:
    """The arrangements to try, each with the name of what was traded last."""
    assert sampling is not None
    yield "as it is", first
    way = replace(first, staged=True)
    yield "one stage in memory at a time, encoders unloaded after encoding", way
    formats = needs.floats(way)
    half = next((f for f in ("float16", "bfloat16") if f in needs.target.formats), None)
    if half is not None and "float32" in formats.values():
        way = replace(way, formats=dict.fromkeys((role for role in ROLES if formats.get(role) == "float32"), half))
        yield f"graphs in {half}", way
    if "int8" in needs.target.formats and needs.has_float_products(way):
        way = replace(way, formats={**way.formats, "denoise": "int8"})
        yield "denoiser in int8", way
    longer, unit = max(way.picture.height, way.picture.width), sampling.downsampling * _TILE_LATENTS
    for tile in dict.fromkeys(longer // part // unit * unit for part in (2, 4)):
        if unit <= tile < longer and needs.stage_bytes("decoder", way) > available:
            way = replace(way, tile=tile)
            yield f"the decoder in tiles of {tile} pixels", way
    while way.picture.batch > 1:
        way = replace(way, picture=replace(way.picture, batch=way.picture.batch // 2))
        yield f"{way.picture.batch} at a time", way
