"""Draw calibration items: a strategy says at which steps, the float bundle draws, and a record tells how they were made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgediffusion import registry
from edgediffusion.bundle import Bundle
from edgediffusion.errors import ArgumentError
from edgediffusion.optimize.collect import Item, collect

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Drawing:
    """How items are drawn: ``samples`` trajectories of ``steps`` steps, one item from each, at the steps ``strategy`` chooses.

    None stands for what the bundle recommends.
    """

    strategy: str = "uniform"
    samples: int = 128
    steps: int | None = None
    seed: int = 0
    guidance_scale: float | None = None
    sampler: str | None = None


@dataclass(frozen=True)
class Drawn:
    """Calibration items, and the record of how they were made: plain data, the same for the same items."""

    items: tuple[Item, ...]
    record: Mapping[str, Any]


def draw_items(bundle: Bundle, prompts: Sequence[str], drawing: Drawing, *, progress: Progress = lambda label, part: None) -> Drawn:
    """Draw calibration items with the float bundle.

    Raises:
        UnknownName: no such strategy or sampler. ArgumentError: no samples or prompts.
    """
    if drawing.samples < 1:
        raise ArgumentError("Calibration needs at least one item", got=drawing.samples, allowed="1 and more")
    chosen = registry.find("optimize.calibration", drawing.strategy, kind="strategy").Strategy()
    from edgediffusion.runtimes.pipeline import Pipeline

    pipeline = Pipeline.from_bundle(bundle)
    steps = pipeline.sampling.steps if drawing.steps is None else drawing.steps
    counts = chosen.allocate(steps, drawing.samples, seed=drawing.seed)
    found = collect(
        pipeline,
        prompts,
        counts,
        seed=drawing.seed,
        sampler=drawing.sampler,
        guidance_scale=drawing.guidance_scale,
        progress=progress,
    )
    record = {
        "strategy": drawing.strategy,
        "options": dict(vars(chosen)),
        "counts": counts.tolist(),
        "seed": drawing.seed,
        "sampler": drawing.sampler or pipeline.sampling.sampler,
        "guidance_scale": pipeline.sampling.guidance_scale if drawing.guidance_scale is None else drawing.guidance_scale,
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
    }
    return Drawn(tuple(found), record)
