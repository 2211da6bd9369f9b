"""Calibration items: what the denoiser was really called with, while the deployment's own sampler drew pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgediffusion.runtimes.pipeline import Pipeline

BATCH = 8  # trajectories at a time


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
    progress: Callable[[str, float], None] = lambda label, part: None,
) -> list[Item]:
    """One item from each of ``counts.sum()`` trajectories, ``counts[i]`` of them at step i of ``len(counts)``.

    Every trajectory has its own prompt (cycled) and its own noise. Those whose items lie at like steps are drawn
    together, so that a batch can stop as soon as its last item is in hand.
    """
    wanted = np.repeat(np.arange(len(counts)), counts)
    order = np.random.default_rng(seed).permutation(len(wanted))
    chosen = [prompts[i % len(prompts)] for i in order]
    items: list[Item] = []
    for start in range(0, len(wanted), BATCH):
        part = slice(start, start + BATCH)
        progress("items", start / len(wanted))
        options: dict[str, Any] = {"sampler": sampler, "guidance_scale": guidance_scale, "seed": seed + start}
        items += _batch(pipeline, chosen[part], wanted[part], len(counts), options)
    progress("items", 1.0)
    return items


def _batch(pipeline: Pipeline, prompts: list[str], wanted: np.ndarray, steps: int, options: Mapping[str, Any]) -> Iterator[Item]:
    found: dict[int, Item] = {}

    def observe(step: int, feeds: Mapping[str, np.ndarray]) -> None:
        for row in map(int, np.flatnonzero(wanted == step)):
            found[row] = Item(step, prompts[row], {name: _rows(array, row, len(prompts)) for name, array in feeds.items()})

    for step in pipeline.steps(prompts, num_inference_steps=steps, observe=observe, **options):
        if step.index >= wanted.max():
            break
    return iter([found[row] for row in range(len(prompts))])


def _rows(array: np.ndarray, row: int, pictures: int) -> np.ndarray:
    """The rows of one picture: [row] or, with guidance, [row, row + pictures]; scalars as they are. Always a copy."""
    if array.ndim == 0 or len(array) % pictures:
        return array.copy()
    return array[row::pictures].copy()
