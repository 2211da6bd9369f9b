"""The points of samplers that call the network twice a step, and once in the last, which ends at the clean picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgediffusion.bundle import NoiseSchedule
from edgediffusion.runtimes.schedules import Point, Points, between_timesteps


def ends(nodes: Sequence[Point], *, noise_scale: float = 1.0) -> Points:
    """The second call of a step lies where it arrives: p_0, p_1, p_1, p_2, p_2, ..., as in diffusers' Heun schedulers."""
    return Points.chain((nodes[0], *(p for node in nodes[1:] for p in (node, node))), noise_scale=noise_scale)


def middles(schedule: NoiseSchedule, nodes: Points, ratios: Sequence[float]) -> Points:
    """The second call of a step lies between its ends, at noise levels ``ratios``: p_0, m_0, p_1, m_1, p_2, ...

    As in diffusers' KDPM2 schedulers, which round the timesteps of Karras' spacing, though not those between.
    """
    at = nodes.at
    if schedule.spacing.startswith("karras"):
        at = tuple(replace(point, timestep=float(round(point.timestep))) for point in at)
    pairs = zip(between_timesteps(schedule, ratios), at[1:], strict=True)
    return Points.chain((at[0], *(p for pair in pairs for p in pair)), noise_scale=nodes.noise_scale)
