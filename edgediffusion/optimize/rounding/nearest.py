"""Every weight to its nearest code: nothing is stored, the codes follow from the scales."""

from __future__ import annotations

from edgediffusion.optimize.rounding import Job
from edgediffusion.optimize.state import LayerState


def round_weights(job: Job) -> dict[str, LayerState]:
    return {}
