"""Which layers stay float: the choice from errors and times of each alone (``sensitivity_plan``), with or without a bound.

Neither errors nor times need add up: whole graphs are built and measured, and what is told of a choice is what was measured of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgediffusion.errors import ArgumentError
from edgediffusion.optimize.sensitivity_bench import Trial
from edgediffusion.optimize.sensitivity_plan import (
    SIGNIFICANT,
    LayerCost,
    Steps,
    first_that_holds,
    is_ugly,
    predicted_error,
    predicted_ratio,
    ranking,
    share,
)
from edgediffusion.optimize.sensitivity_report import Point, Sensitivity

Progress = Callable[[str, float], None]
_GRID = 4  # parts of the Pareto table between its measured rows


@dataclass(frozen=True)
class Bound:
    """What a choice has to hold: an ``error`` of the guided prediction, relative, or a ``latency`` of a step over the float one's."""

    kind: str
    value: float


def choose(
    layers: Sequence[LayerCost], bench: Any, bound: Bound | None, target: str, *, progress: Progress = lambda label, part: None
) -> Sensitivity:
    """Which of ``layers`` stay float. ``bench`` measures a choice: ``bench.trial(kept) -> Trial``, ``bench.steps -> Steps``.

    Raises:
        ArgumentError: the bound cannot be held.
    """
    order = [layer.name for layer in ranking(layers)]
    slower = [layer.name for layer in ranking(layers) if layer.is_slower]
    notes: list[str] = []
    done = 0

    def trial(kept: Collection[str]) -> Trial:
        nonlocal done
        done += 1
        progress("whole graphs", done / (done + 3))  # how many there will be is known at the end
        found: Trial = bench.trial(frozenset(kept))
        return found

    trial(())
    if bound is None:
        kept = _two_sided(layers, slower, trial, notes)
    elif bound.kind == "error":
        kept = _hold_error(order, len(slower), bound.value, trial)
    else:
        kept = _hold_latency(order, len(slower), bound.value, trial)
    for part in range(_GRID):
        trial(order[: len(slower) + (len(order) - len(slower)) * part // _GRID])
    chosen = trial(kept)
    progress("whole graphs", 1.0)
    if bound is None and chosen.ratio.value - 1 > SIGNIFICANT * chosen.ratio.noise:
        notes.append(
            f"A step takes {chosen.ratio.value:.2f} of the float one's time even so: on this machine quantizing saves memory, not time."
        )
    reasons = {name: _reason(layer, layers, name in slower, bound, target) for layer in layers if (name := layer.name) in kept}
    points = _points(layers, order, bench, frozenset(kept), len(slower))
    stated = {} if bound is None else {bound.kind: bound.value}
    return Sensitivity("", "", "", target, "", "", reasons, tuple(layers), points, stated, tuple(notes))


def _two_sided(layers: Sequence[LayerCost], slower: Sequence[str], trial: Callable[[Collection[str]], Trial], notes: list[str]) -> set[str]:
    """Layers that are slower, if whole steps do not say otherwise; and those that are ugly."""
    kept = set(slower)
    if slower:
        step = trial(slower).to_quantized
        if step.value - 1 > SIGNIFICANT * step.noise:
            notes.append(
                f"{len(slower)} layers are slower alone when quantized, yet with them float a step takes {step.value:.3f} ± "
                f"{step.noise:.3f} of the time that it takes with all quantized: they are quantized."
            )
            kept = set()
    return kept | {layer.name for layer in layers if is_ugly(layer, layers)}


def _hold_error(order: Sequence[str], free: int, bound: float, trial: Callable[[Collection[str]], Trial]) -> set[str]:
    last = max(len(order) - 1, 0)
    free = min(free, last)
    found = first_that_holds(lambda count: trial(order[:count]).error <= bound, free, last)
    if found is None:
        raise ArgumentError(
            f"No choice of layers holds the error of {bound:g}",
            got=f"{trial(order[:last]).error:.3g} with one layer quantized, {trial(()).error:.3g} with all {len(order)}",
            do="Allow a larger error, use a recipe of more bits, or the float bundle.",
        )
    return set(order[:found])


def _hold_latency(order: Sequence[str], free: int, bound: float, trial: Callable[[Collection[str]], Trial]) -> set[str]:
    last = max(len(order) - 1, 0)
    free = min(free, last)
    fastest, count = min((trial(order[:count]).ratio.value, count) for count in (free, 0))
    if fastest > bound:
        raise ArgumentError(
            f"No choice of layers holds a step of {bound:g} of the float one's time",
            got=f"{fastest:.3f} for the fastest, with {count} of {len(order)} layers float",
            do="Allow a longer step, or use another recipe or target.",
        )
    beyond = first_that_holds(lambda count: trial(order[:count]).ratio.value > bound, free, last)
    return set(order[: last if beyond is None else max(beyond - 1, 0)])


def _reason(layer: LayerCost, layers: Sequence[LayerCost], slower: bool, bound: Bound | None, target: str) -> str:
    alone = f"quantized alone it changes the prediction by {layer.error:.2%}"
    if slower:
        return f"slower when quantized: {1e3 * (layer.quantized_ms or 0):.0f} us for {1e3 * (layer.float_ms or 0):.0f} us on {target}"
    if bound is None:
        return f"{alone}, {share(layer, layers):.0%} of the squared error of all layers"
    if bound.kind == "error":
        return f"needed to hold the error of {bound.value:.2%}: {alone}"
    return f"a step of {bound.value:g} of the float one's time leaves time for it: {alone}"


def _points(layers: Sequence[LayerCost], order: Sequence[str], bench: Any, kept: frozenset[str], free: int) -> tuple[Point, ...]:
    """The first k of ``order`` float, for every k; and ``kept``, where that is none of them."""
    steps: Steps = bench.steps
    choices = [frozenset(order[:count]) for count in range(len(order) + 1)]
    if kept not in choices:
        choices.insert(len(kept) + 1, kept)
    points = []
    for choice in choices:
        labels = {frozenset(): "all quantized", frozenset(order[:free]): "the slower ones float", frozenset(order): "all float"}
        label = ", ".join(
            text for text in (labels.get(choice, "") if choice or free else "all quantized", "chosen" * (choice == kept)) if text
        )
        point = Point(len(choice), label, predicted_error(layers, choice), predicted_ratio(layers, choice, steps))
        if len(choice) == len(order):
            point = replace(point, error=0.0, ratio=1.0, noise=0.0)
        elif (found := bench.known(choice)) is not None:
            point = replace(point, error=found.error, ratio=found.ratio.value, noise=found.ratio.noise)
        points.append(point)
    return tuple(points)
