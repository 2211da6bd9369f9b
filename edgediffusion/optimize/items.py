"""Draw calibration items: a strategy says at which steps, the float bundle draws, and a record tells how they were made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgediffusion import __version__
from edgediffusion.bundle import Bundle
from edgediffusion.errors import ArgumentError
from edgediffusion.optimize.calibration import Features, Strategy, find_strategy
from edgediffusion.optimize.collect import BATCH, Item, assign, collect
from edgediffusion.optimize.parts import Parts
from edgediffusion.registry import find
from edgediffusion.runtimes import caching
from edgediffusion.runtimes.pipeline import Pipeline
from edgediffusion.runtimes.samplers import resolve

Progress = Callable[[str, float], None]
Tell = Callable[[str], None]
_ALLOCATION = "allocation"


@dataclass(frozen=True)
class Drawing:
    """How items are drawn: ``samples`` trajectories of ``steps`` steps, one item from each, at the steps ``strategy`` chooses.

    None stands for what the bundle recommends. ``options`` are fields of the strategy; ``cache`` is the caching policy under which
    the pictures will be drawn, ``None`` for none.
    """

    strategy: str = "uniform"
    samples: int = 128
    steps: int | None = None
    seed: int = 0
    guidance_scale: float | None = None
    sampler: str | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    cache: str | None = None


@dataclass(frozen=True)
class Drawn:
    """Calibration items, and the record of how they were made: plain data, the same for the same items."""

    items: tuple[Item, ...]
    record: Mapping[str, Any]


def draw_items(
    bundle: Bundle,
    prompts: Sequence[str],
    drawing: Drawing,
    *,
    keep: Path | None = None,
    tell: Tell = lambda line: None,
    progress: Progress = lambda label, part: None,
) -> Drawn:
    """Draw calibration items with the float bundle.

    In the folder ``keep``, finished batches are kept, and found again by a later call with the same arguments. ``tell``
    gets sentences for a person: steps that no item falls on, items that were there already.

    Raises:
        UnknownName: no such strategy, sampler or caching policy. ArgumentError: samples, steps, prompts or options that cannot be used.
        BundleError: the bundle lacks the cut that the policy needs.
        EngineError: the network's numbers are not finite. OutputError: the disk is full.
    """
    strategy = check_drawing(drawing, prompts)
    pipeline = Pipeline.from_bundle(bundle)
    job = _Job(bundle, tuple(prompts), _settle(drawing, strategy, pipeline), strategy)
    parts = Parts.of(keep, job.setting)
    allocation = parts.read(_ALLOCATION)
    if allocation is None:
        allocation = job.allocate(keep, progress)
        parts.write(_ALLOCATION, allocation)
    counts = allocation["counts"]
    if job.drawing.samples < len(counts) and not strategy.SKIPS:
        tell(
            f"There are fewer items than steps: {np.count_nonzero(counts == 0)} of {len(counts)} steps have none, and what "
            f"activations do there is not measured. Got: {job.drawing.samples} items. Give --samples {len(counts)} or more."
        )
    found = collect(pipeline, prompts, counts, cache=job.drawing.cache, parts=parts, tell=tell, progress=progress, **job.options)
    return Drawn(tuple(found), job.record(allocation))


@dataclass(frozen=True)
class _Job:
    """``drawing`` with nothing left open."""

    bundle: Bundle
    prompts: tuple[str, ...]
    drawing: Drawing
    strategy: Strategy

    @property
    def options(self) -> dict[str, Any]:
        return {"seed": self.drawing.seed, "sampler": self.drawing.sampler, "guidance_scale": self.drawing.guidance_scale}

    @property
    def setting(self) -> dict[str, Any]:
        """All that the items depend on."""
        engine = find("runtimes.engines", "onnxruntime").version()
        return {
            "bundle": self.bundle.digest,
            "prompts": self.prompts,
            "drawing": asdict(self.drawing),
            "batch": BATCH,
            "versions": [__version__, engine, np.__version__],
        }

    def allocate(self, keep: Path | None, progress: Progress) -> dict[str, np.ndarray]:
        """``counts`` of the strategy and, if it looked into the network, the module ``cut`` that it looked at."""
        looked: dict[str, np.ndarray] = {}

        def features(cut: str | None) -> Features:
            from edgediffusion.optimize.features import tapped

            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
            with tapped(self.bundle, self.bundle.with_role("denoise")[0], cut, folder=keep) as tap:
                looked["cut"] = np.array(tap.cut)
                batch = assign(self.prompts, self.drawing.samples, self.drawing.seed)
                return tap.draw(batch, progress=progress, num_inference_steps=self.drawing.steps, **self.options)

        assert self.drawing.steps is not None  # settled
        counts = self.strategy.allocate(self.drawing.steps, self.drawing.samples, seed=self.drawing.seed, features=features)
        return {"counts": counts, **looked}

    def record(self, allocation: Mapping[str, np.ndarray]) -> dict[str, Any]:
        looked = {"cut": str(allocation["cut"])} if "cut" in allocation else {}
        return {
            "strategy": self.drawing.strategy,
            "options": {**self.drawing.options, **looked},
            "counts": allocation["counts"].tolist(),
            "seed": self.drawing.seed,
            "sampler": self.drawing.sampler,
            "guidance_scale": self.drawing.guidance_scale,
            "prompts": hashlib.sha256("\n".join(self.prompts).encode()).hexdigest(),
            **({} if self.drawing.cache is None else {"cache": self.drawing.cache}),
        }


def check_drawing(drawing: Drawing, prompts: Sequence[str]) -> Strategy:
    """Refuse what can be refused before anything is loaded; the strategy with its options.

    Raises:
        UnknownName: no such strategy, sampler or caching policy. ArgumentError: samples, steps, prompts or options that cannot be used.
    """
    if drawing.samples < 1:
        raise ArgumentError("Calibration needs at least one item", got=drawing.samples, allowed="1 and more")
    if drawing.steps is not None and drawing.steps < 1:
        raise ArgumentError("A trajectory has at least one step", got=drawing.steps, allowed="1 and more")
    if not prompts:
        raise ArgumentError(
            "Calibration draws pictures and has no prompts for them", do="Give a file with one prompt on each line: --prompts FILE"
        )
    if drawing.sampler is not None:
        resolve(drawing.sampler)
    caching.resolve(drawing.cache)
    return find_strategy(drawing.strategy, drawing.options)


def _settle(drawing: Drawing, strategy: Strategy, pipeline: Pipeline) -> Drawing:
    """Put what the bundle and the strategy recommend in the place of what was left open."""
    sampling = pipeline.sampling
    return replace(
        drawing,
        steps=sampling.steps if drawing.steps is None else drawing.steps,
        guidance_scale=sampling.guidance_scale if drawing.guidance_scale is None else drawing.guidance_scale,
        sampler=drawing.sampler or sampling.sampler,
        options=dict(vars(strategy)),
    )
