"""Calibration items: what the denoiser was really called with, while the deployment's own sampler drew pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgediffusion.bundle import Bundle, Component
from edgediffusion.optimize.parts import Parts
from edgediffusion.runtimes import caching
from edgediffusion.runtimes.network import Call, Joined, Network, Policy
from edgediffusion.runtimes.pipeline import Pipeline

BATCH = 8  # trajectories at a time; another number would give each other noise


@dataclass(frozen=True)
class Item:
    """One call of the denoiser: its inputs by name, one row for each half of the guidance batch."""

    step: int
    prompt: str
    feeds: Mapping[str, np.ndarray]


def collect(
    pipeline: Pipeline,
    prompts: Sequence[str],
    counts: np.ndarray,
    *,
    seed: int,
    sampler: str | None = None,
    guidance_scale: float | None = None,
    cache: str | None = None,
    parts: Parts | None = None,
    tell: Callable[[str], None] = lambda line: None,
    progress: Callable[[str, float], None] = lambda label, part: None,
) -> list[Item]:
    """One item from each of ``counts.sum()`` trajectories, ``counts[i]`` of them at step i of ``len(counts)``.

    Every trajectory has its own prompt (cycled) and its own noise. Those whose items lie at like steps are drawn
    together, so that a batch can stop as soon as its last item is in hand. Batches that are among ``parts`` are not
    drawn again, and ``tell`` is told how many items they held; the others are added to them. With ``cache``, a caching policy, the
    trajectories are the ones that are drawn under it; items are taken at all of their calls, those answered in part from it too.

    Raises:
        EngineError: a graph gives a number that is not finite; the message names the graph and the step.
    """
    parts = parts or Parts(None)
    wanted = np.repeat(np.arange(len(counts)), counts)
    batches = {start: _Batch(assign(prompts, len(wanted), seed, start), wanted[start : start + BATCH]) for start in _starts(wanted)}
    items = {start: found for start, batch in batches.items() if (found := _read(parts, start, batch)) is not None}
    if items:
        tell(f"{sum(map(len, items.values()))} of {len(wanted)} items were there already, from a run that was stopped.")

    def advance(start: int) -> Callable[[float], None]:
        done = sum(map(len, items.values()))
        return lambda part: progress("items", (done + part * len(batches[start].prompts)) / len(wanted))

    for start in _starts(wanted):
        if start not in items:
            options: dict[str, Any] = {"sampler": sampler, "guidance_scale": guidance_scale, "seed": seed + start}
            if cache is not None:
                options["cache"] = _Watched(caching.resolve(cache))
            items[start] = batches[start].draw(pipeline, len(counts), options, advance(start))
            parts.write(_name(start), _to_arrays(items[start]))
    progress("items", 1.0)
    return [item for start in _starts(wanted) for item in items[start]]


def assign(prompts: Sequence[str], samples: int, seed: int, start: int = 0) -> list[str]:
    """The prompts of the batch that begins at trajectory ``start`` of ``samples``."""
    order = np.random.default_rng(seed).permutation(samples)
    return [prompts[i % len(prompts)] for i in order[start : start + BATCH]]


@dataclass(frozen=True)
class _Watched:
    """A caching policy whose calls are all observed: what a shallow graph computes is calibrated at the steps that it runs at."""

    policy: Policy

    def components(self, bundle: Bundle) -> tuple[Component, ...]:
        return self.policy.components(bundle)

    def start(self, graphs: Joined, calls: int) -> Network:
        network = self.policy.start(graphs, calls)

        def ask(call: Call) -> np.ndarray:
            graphs.feed(call)  # a policy that answers from memory alone feeds nothing
            graphs.observed(call)
            return network(replace(call, observe=None))

        return ask


@dataclass(frozen=True)
class _Batch:
    """Trajectories that are drawn together: for each its prompt and the step that its item is taken at."""

    prompts: list[str]
    wanted: np.ndarray

    def draw(self, pipeline: Pipeline, steps: int, options: Mapping[str, Any], progress: Callable[[float], None]) -> list[Item]:
        found: dict[int, Item] = {}

        def observe(step: int, feeds: Mapping[str, np.ndarray]) -> None:
            for row in map(int, np.flatnonzero(self.wanted == step)):
                found[row] = Item(step, self.prompts[row], {name: _rows(array, row, len(self.prompts)) for name, array in feeds.items()})

        last = int(self.wanted.max())
        progress(0.0)
        for step in pipeline.steps(self.prompts, num_inference_steps=steps, observe=observe, **options):
            progress((step.index + 1) / (last + 1))
            if step.index >= last:
                break
        return [found[row] for row in range(len(self.prompts))]


def _rows(array: np.ndarray, row: int, pictures: int) -> np.ndarray:
    """The rows of one picture: [row] or, with guidance, [row, row + pictures]; scalars as they are. Always a copy."""
    if array.ndim == 0 or len(array) % pictures:
        return array.copy()
    return array[row::pictures].copy()


def _starts(wanted: np.ndarray) -> range:
    return range(0, len(wanted), BATCH)


def _name(start: int) -> str:
    return f"items-{start:06}"


def _to_arrays(items: Sequence[Item]) -> dict[str, np.ndarray]:
    return {name: np.stack([item.feeds[name] for item in items]) for name in items[0].feeds}


def _read(parts: Parts, start: int, batch: _Batch) -> list[Item] | None:
    arrays = parts.read(_name(start))
    if arrays is None:
        return None
    rows = enumerate(zip(batch.wanted.tolist(), batch.prompts, strict=True))
    return [Item(step, prompt, {name: array[row, ...] for name, array in arrays.items()}) for row, (step, prompt) in rows]
