"""Sensitivity: what each layer's quantization costs in error and gains in time on the target, and which layers stay float for it.

Both sides are measured: errors in the guided prediction (``sensitivity_errors``), times in the engine's own profile
(``sensitivity_times``). The choice (``sensitivity_choice``) is made from these, by whole graphs that are built and measured.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgediffusion import registry, targets
from edgediffusion.bundle import Bundle, Component
from edgediffusion.errors import ArgumentError, OutputError
from edgediffusion.optimize.calibrate import _same_source, read_prompts
from edgediffusion.optimize.items import Drawing, check_drawing, draw_items
from edgediffusion.optimize.quantize import check_formats, check_weights, recipe_for
from edgediffusion.optimize.recipe import Placement, Recipe, load_placement
from edgediffusion.optimize.sensitivity_bench import Bench
from edgediffusion.optimize.sensitivity_choice import Bound, choose
from edgediffusion.optimize.sensitivity_plan import LayerCost
from edgediffusion.optimize.sensitivity_report import Sensitivity
from edgediffusion.optimize.state import QuantizationState
from edgediffusion.runtimes.engine_manifest import host

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Request:
    """``samples`` items are drawn anew, by the calibration's own settings and another seed; ``runs`` are timed."""

    samples: int = 16
    runs: int = 40
    prompts: Sequence[str] | None = None
    threads: int | None = None


def sensitivity(
    bundle: Bundle,
    state: str | Path | QuantizationState,
    output: str | Path,
    *,
    source: str | Path | None = None,
    recipe: str | Recipe | None = None,
    target: str = "cpu-x86-64",
    max_error: float | None = None,
    max_latency: float | None = None,
    request: Request | None = None,
    progress: Progress = lambda label, part: None,
) -> Sensitivity:
    """Measure every layer that ``quantize`` would quantize, choose those that stay float, and write the report to ``output``.

    Without a bound, layers stay float that are slower when quantized, as far as whole steps confirm it, and those that are
    worth a decibel of the error each. ``max_error`` keeps as few layers float as hold it; ``max_latency`` as many. With the
    ``source``, the diffusers folder that the bundle was exported from, errors of all layers come from a few passes in torch;
    without, the engine runs a graph for each layer, which takes as many times as long.

    Raises:
        UnknownName: no such target or recipe. OutputError: ``output`` exists.
        ArgumentError: both bounds, one that cannot be held (the message has the best that can), a state of other weights, a bundle
        that is quantized already, no prompts, or an engine that cannot tell what each node takes.
        BundleError: the quantized graph gives numbers that are not finite; the message names the layer.
    """
    request = request or Request()
    bound = _bound(max_error, max_latency)
    if Path(output).exists():
        raise OutputError(f"The output '{output}' exists already", do="Choose another name, or remove it first.")
    known = state if isinstance(state, QuantizationState) else QuantizationState.load(state)
    job = _job(bundle, known, recipe, target)
    prompts = _prompts(bundle, request, source)
    if source is not None:
        check_source(bundle, Path(source))
    items, record = _items(job, request, prompts, progress)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=Path(output).parent, prefix=".sensitivity-") as folder:
        bench = Bench(bundle, job.component, job.states, job.recipe, job.placement, job.engine, items, job.guidance_scale, Path(folder))
        bench.open(runs=request.runs, threads=request.threads)
        layers = _layers(job, bench, items, source, progress)
        found = choose(layers, bench, bound, job.target, progress=progress)
    found = replace(
        found,
        weights=known.weights,
        state=known.digest,
        recipe=job.recipe.name,
        placement=job.placement.name,
        component=job.component.name,
        measurement={
            "items": record,
            "runs": request.runs,
            "engine": {job.engine_name: job.engine.version(), "threads": request.threads},
            "host": {**asdict(host()), "cpu": list(host().cpu)},
        },
    )
    found.save(Path(output))
    return found


@dataclass(frozen=True)
class _Job:
    bundle: Bundle
    component: Component
    state: QuantizationState
    recipe: Recipe
    placement: Placement
    target: str
    engine_name: str
    engine: Any

    @property
    def states(self) -> dict[str, Any]:
        prefix = f"{self.component.name}/"
        return {name.removeprefix(prefix): layer for name, layer in self.state.layers.items() if name.startswith(prefix)}

    @property
    def guidance_scale(self) -> float | None:
        return float(self.state.calibration["guidance_scale"])


def _bound(max_error: float | None, max_latency: float | None) -> Bound | None:
    if max_error is not None and max_latency is not None:
        raise ArgumentError(
            "An error and a latency cannot both be bounds: the one is held by keeping layers float, the other by not doing so",
            got=f"an error of {max_error:g} and a latency of {max_latency:g}",
            do="Give one, and read the other from the table.",
        )
    if max_error is not None and not 0 < max_error < np.inf:
        raise ArgumentError("The largest error is a part of the prediction", got=max_error, allowed="more than 0, such as 0.02")
    if max_latency is not None and not 0 < max_latency <= 1:
        raise ArgumentError(
            "The longest step is given as a part of the float one", got=max_latency, allowed="more than 0 and at most 1, such as 0.8"
        )
    if max_error is not None:
        return Bound("error", max_error)
    return None if max_latency is None else Bound("latency", max_latency)


def _job(bundle: Bundle, state: QuantizationState, recipe: str | Recipe | None, target: str) -> _Job:
    device = targets.load(target)
    chosen = recipe_for(state, recipe)
    denoisers = bundle.with_role("denoise")
    if len(denoisers) != 1:
        raise ArgumentError("Sensitivity needs a bundle with one denoiser", got=f"{len(denoisers)} of them")
    check_weights(bundle, denoisers[0], state)
    if state.below:
        raise ArgumentError(
            f"The recipe '{chosen.name}' has a graph for each stage of sampling, and sensitivity measures one",
            got=f"{len(state.below) + 1} stages",
            do="Measure with a state of one stage: set stages = 1 in the recipe and calibrate again.",
        )
    name = device.engines[0]
    engine = registry.find("runtimes.engines", name, kind="engine")
    if not hasattr(engine, "time_nodes"):
        raise ArgumentError(f"The engine '{name}' of the target '{device.name}' cannot tell what each node of a graph takes")
    placement = load_placement(device.placement)
    check_formats(chosen, placement)
    if chosen.dynamic:
        raise ArgumentError(
            "Sensitivity compares layers with the float ones, node by node, and products with ranges at run time are several nodes",
            got=f"dynamic = {chosen.dynamic!r} in the recipe '{chosen.name}'",
            do="Measure with a state that was calibrated without dynamic.",
        )
    return _Job(bundle, denoisers[0], state, chosen, placement, device.name, name, engine)


def _prompts(bundle: Bundle, request: Request, source: str | Path | None) -> list[str]:
    if request.samples < 1 or request.runs < 1:
        raise ArgumentError("Sensitivity needs items and timed runs", got=f"{request.samples} and {request.runs}", allowed="1 and more")
    return list(request.prompts) if request.prompts is not None else read_prompts(bundle.path if source is None else Path(source))


def _items(
    job: _Job, request: Request, prompts: Sequence[str], progress: Progress
) -> tuple[list[Mapping[str, np.ndarray]], Mapping[str, Any]]:
    """Items that the calibration has not seen: drawn by its settings with the next seed."""
    made = job.state.calibration
    drawing = Drawing(
        "uniform", request.samples, len(made["counts"]), made["seed"] + 1, made["guidance_scale"], made["sampler"], cache=made.get("cache")
    )
    check_drawing(drawing, prompts)
    drawn = draw_items(job.bundle, prompts, drawing, progress=progress)
    return [item.feeds for item in drawn.items], drawn.record


def check_source(bundle: Bundle, source: Path) -> None:
    """Refuse a source that the bundle was not exported from (SourceError, ArgumentError)."""
    from edgediffusion.export.source import Source

    _same_source(bundle, Source.open(source))


def _layers(
    job: _Job, bench: Bench, items: Sequence[Mapping[str, np.ndarray]], source: str | Path | None, progress: Progress
) -> tuple[LayerCost, ...]:
    marked = bench.marked
    if not marked.quantized:
        raise ArgumentError(f"The recipe '{job.recipe.name}' quantizes no layer of this bundle: there is nothing to measure")
    wanted = [name for name in marked.layers if name in marked.quantized]
    simulated = not job.recipe.rank and all("fp8" not in job.recipe.formats(name) for name in wanted)  # what torch can imitate here
    if source is None or not simulated:
        errors = bench.errors(wanted, progress)
    else:
        from edgediffusion.optimize.sensitivity_errors import Quantization, errors_of_source

        quantization = Quantization(job.states, job.recipe, job.placement, wanted, marked.quantized_outputs)
        of_source = (job.bundle, job.component, Path(source), items, quantization)
        errors = errors_of_source(*of_source, guidance_scale=job.guidance_scale, progress=lambda part: progress("errors by layer", part))
    times = bench.times(progress)
    return tuple(LayerCost(name, errors.get(name, 0.0), *times.get(name, ())) for name in wanted)
