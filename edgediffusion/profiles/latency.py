"""Latency of a bundle's components, as the sampling loop calls them.

Several bundles are measured in turn, a few calls each, in one process: on a machine that others use too, what disturbs one disturbs
all, and only their ratio is worth quoting.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgediffusion.bundle import Bundle, Component, TensorSpec
from edgediffusion.errors import ArgumentError
from edgediffusion.runtimes.engines import Binding
from edgediffusion.runtimes.graph import open_graphs

_BLOCK = 5  # timed calls in a turn


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call over ``runs`` timed calls, and of loading the engine."""

    median_ms: float
    p90_ms: float
    min_ms: float
    max_ms: float
    runs: int
    load_ms: float

    @classmethod
    def of(cls, times_ms: Sequence[float], load_ms: float) -> Latency:
        t = np.asarray(times_ms)
        return cls(float(np.median(t)), float(np.percentile(t, 90)), float(t.min()), float(t.max()), len(t), load_ms)


def measure(
    bundles: Sequence[Bundle],
    *,
    target: str | None = None,
    runs: int = 30,
    warmup: int = 3,
    threads: int | None = None,
    batch: int = 1,
    progress: Callable[[str, float], None] = lambda label, part: None,
) -> list[dict[str, Latency]]:
    """For each bundle, the latency of each component by name; ``batch`` pictures at a time.

    The denoiser runs at the batch that guidance makes of it: twice as many rows for classifier-free guidance.
    """
    if runs < 1 or warmup < 0:
        raise ArgumentError("Timing needs at least one run", got=f"runs={runs}, warmup={warmup}", allowed="runs >= 1, warmup >= 0")
    results: list[dict[str, Latency]] = [{} for _ in bundles]
    names = list(dict.fromkeys(c.name for bundle in bundles for c in bundle.components))
    for at, name in enumerate(names):
        progress(name, at / len(names))
        loaded = [_load(bundle, name, target, threads, batch) for bundle in bundles]
        times = _time_in_turn({i: binding for i, (binding, _) in enumerate(loaded)}, runs, warmup)
        for i, (_, load_ms) in enumerate(loaded):
            results[i][name] = Latency.of(times[i], load_ms)
    progress("done", 1.0)
    return results


def _load(bundle: Bundle, name: str, target: str | None, threads: int | None, batch: int) -> tuple[Binding, float]:
    component = bundle.component(name)
    alone = replace(bundle, components=(component,))
    started = time.perf_counter()
    (graph,) = open_graphs(alone, (component.role,), target=target, threads=threads)
    load_ms = (time.perf_counter() - started) * 1e3
    binding = graph.session.bind(axes_of(bundle, component, batch))
    rng = np.random.default_rng(0)
    for spec in component.inputs:
        _fill(binding.inputs[spec.name], spec, rng)
    return binding, load_ms


def axes_of(bundle: Bundle, component: Component, batch: int) -> dict[str, int]:
    """Sizes of the named axes at the bundle's default picture size."""
    facts = bundle.sampling
    if facts is None:
        return {"batch": batch}
    rows = 2 * batch if component.role.startswith(("denoise", "control")) and facts.guidance == "classifier-free" else batch
    height, width = facts.height, facts.width
    latent = {"height": height // facts.downsampling, "width": width // facts.downsampling}
    return {"batch": rows, **latent, "image_height": height, "image_width": width}


def _fill(array: np.ndarray, spec: TensorSpec, rng: np.random.Generator) -> None:
    """Normal noise for floating inputs, 500 for a time step, zeros for token ids."""
    if spec.name == "timestep":
        array[...] = 500
    elif np.issubdtype(array.dtype, np.floating):
        array[...] = rng.standard_normal(array.shape)
    else:
        array[...] = 0


def _time_in_turn(bindings: Mapping[int, Binding], runs: int, warmup: int) -> dict[int, list[float]]:
    """Times of ``runs`` calls of each binding, in blocks: the worker threads of an engine go on spinning for a while
    after a call, on cores that the next one needs, so the first call of a block is not timed."""
    times: dict[int, list[float]] = {i: [] for i in bindings}
    for binding in bindings.values():
        for _ in range(warmup):
            binding.run()
    while any(len(found) < runs for found in times.values()):
        for i, binding in bindings.items():
            binding.run()
            for _ in range(min(_BLOCK, runs - len(times[i]))):
                started = time.perf_counter()
                binding.run()
                times[i].append((time.perf_counter() - started) * 1e3)
    return times
