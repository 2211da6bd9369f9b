"""Sizes that a network is told as a condition, ``time_ids``: Podell et al. 2023 (2307.01952), section 2.2.

A row is the numbers that ``Sampling.time_ids`` names, which are set as diffusers' pipelines set them: the picture was trained
on as one of ``original_size``, from which a part was cut whose upper left corner lay at ``crops_coords_top_left``, and
shall look like one of ``target_size``. Sizes that nobody gives are the picture's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgediffusion.bundle import SIZES, Sampling
from edgediffusion.errors import ArgumentError

if TYPE_CHECKING:
    from edgediffusion.runtimes.request import Request

Pair = tuple[float, float]
OPTIONS = ("original_size", "crops_coords_top_left", "target_size")


def time_ids(request: Request, sampling: Sampling, size: tuple[int, int]) -> tuple[tuple[float, ...], ...]:
    """The numbers for a picture of ``size``, and those for the unconditional row; empty if the network is told none.

    Raises:
        ArgumentError: something that is no height and width, or place.
    """
    given = {name: _pair(name, getattr(request, name)) for option in OPTIONS for name in (option, f"negative_{option}")}
    if not sampling.time_ids:
        return ()
    own: tuple[Pair, ...] = (size, (0, 0), size)
    told = [given[option] or default for option, default in zip(OPTIONS, own, strict=True)]
    away = [given[f"negative_{option}"] or positive for option, positive in zip(OPTIONS, told, strict=True)]
    return _row(sampling, told, request.aesthetic_score), _row(sampling, away, request.negative_aesthetic_score)


def without_effect(request: Request, sampling: Sampling) -> tuple[str, ...]:
    """Options that were given to a network that is told nothing."""
    names = [name for option in OPTIONS for name in (option, f"negative_{option}") if getattr(request, name) is not None]
    return (f"{' and '.join(names)} without effect: this network is told no sizes.",) if names and not sampling.time_ids else ()


def _row(sampling: Sampling, pairs: Sequence[Pair], score: float) -> tuple[float, ...]:
    """``pairs`` are those of ``OPTIONS``."""
    known = dict(zip(SIZES, (number for pair in pairs for number in pair), strict=True))
    known["aesthetic_score"] = score
    return tuple(float(known[name]) for name in sampling.time_ids)


def _pair(name: str, given: Sequence[float] | None) -> Pair | None:
    if given is None:
        return None
    if len(given) != 2 or not all(number >= 0 for number in given):
        what = "top and left" if "crops" in name else "height and width"
        raise ArgumentError(f"{name} cannot be used", got=", ".join(map(str, given)) or "nothing", allowed=f"{what} in pixels")
    return given[0], given[1]
