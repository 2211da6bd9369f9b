"""A part of a sampler's walk, in whole steps: its later ones, for what begins in a picture, or those down to some time step."""

from __future__ import annotations

from itertools import takewhile

from edgediffusion.errors import ArgumentError
from edgediffusion.runtimes.samplers import Sampler
from edgediffusion.runtimes.schedules import Points


def first_calls(points: Points, steps: int, name: str, sampler: Sampler) -> tuple[int, ...]:
    """The number of the call that each of so many steps begins with.

    Raises:
        ArgumentError: the sampler's calls of the network do not divide into steps.
    """
    calls = -(-len(points) // steps)
    if hasattr(sampler, "after"):  # its calls do not divide evenly: where there is one more than steps, the second repeats the first
        if len(points) <= steps + 1:
            return (0, *range(1 + len(points) - steps, len(points)))
    elif len(points) in (calls * steps, calls * (steps - 1) + 1):
        return tuple(range(0, len(points), calls))
    raise ArgumentError(
        f"The sampler '{name}' cannot begin in the middle, nor stop there", do="Take another one, or a strength of 1, or the whole walk."
    )


def later(points: Points, steps: int, skipped: int, name: str, sampler: Sampler) -> Points:
    """The end of a walk of ``steps`` steps, of which the first ones are left out. Errors as in ``first_calls``."""
    if not skipped:
        return points
    if hasattr(sampler, "after"):
        rest: Points = sampler.after(points, skipped)
        return rest
    call = first_calls(points, steps, name, sampler)[skipped]
    return Points(points.at[call:], points.to[call:], points.noise_scale)


def steps_above(timestep: float, points: Points, steps: int, name: str, sampler: Sampler) -> int:
    """How many of the first steps begin at this time step or above. Errors as in ``first_calls``."""
    begun = (points.at[call].timestep for call in first_calls(points, steps, name, sampler))
    return sum(1 for _ in takewhile(lambda t: t >= timestep, begun))
