"""Parts of walks, in whole steps: where they are cut, for every sampler that can be."""

from __future__ import annotations

import pytest

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.errors import ArgumentError
from edgediffusion.registry import find, names
from edgediffusion.runtimes.handover import Share
from edgediffusion.runtimes.samplers import resolve
from edgediffusion.runtimes.walks import first_calls, later, steps_above

SCHEDULE = NoiseSchedule("scaled_linear", 1000, 0.00085, 0.012, steps_offset=1)
DIFFUSION = [name for name in names("runtimes.samplers") if find("runtimes.samplers", name).KIND != "flow"]
TWO_CALLS = ("heun", "dpm2", "dpm2-ancestral")


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("name", DIFFUSION)
def test_both_parts_together_are_the_walk(name: str, steps: int) -> None:
    """What one network leaves is what the other begins with: the same point, and no step twice or never."""
    _, sampler = resolve(name)
    try:
        points = sampler.points(SCHEDULE, steps)
        begun = first_calls(points, steps, name, sampler)
    except ArgumentError:
        pytest.skip(f"{name} has no such walk, or none that can be cut")
    assert len(begun) == steps
    for cutoff in range(0, 1001, 50):
        kept = steps_above(cutoff, points, steps, name, sampler)
        if not 0 < kept < steps:
            continue
        calls = Share(end=cutoff).calls(points, steps, name, sampler)
        rest = later(points, steps, Share(start=cutoff).skipped(points, steps, name, sampler), name, sampler)
        assert points.at[calls] == rest.at[0]
        assert len(rest) - len(points) + calls == (1 if name == "pndm" and steps - kept > 1 else 0)  # its warm-up, once more
        assert points.at[begun[kept - 1]].timestep >= cutoff > rest.at[0].timestep


@pytest.mark.parametrize("name", TWO_CALLS)
def test_a_step_of_two_calls_is_never_parted(name: str) -> None:
    _, sampler = resolve(name)
    points = sampler.points(SCHEDULE, 5)
    assert first_calls(points, 5, name, sampler) == (0, 2, 4, 6, 8)
    middle = (points.at[2].timestep + points.at[4].timestep) / 2
    assert Share(end=round(middle)).calls(points, 5, name, sampler) == 4


@pytest.mark.parametrize("steps", [9, 10, 20])  # of 18, 19 and 29 calls: it looks as if 9 or 10 divided them
def test_runge_and_kuttas_steps_are_refused(steps: int) -> None:
    name, sampler = resolve("pndm:skip_prk_steps=false")
    with pytest.raises(ArgumentError, match="cannot begin in the middle, nor stop there"):
        first_calls(sampler.points(SCHEDULE, steps), steps, name, sampler)
