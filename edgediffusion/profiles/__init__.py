"""Profiles: what was measured on this machine, never what should be."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from edgediffusion.bundle import CONTROL, Bundle
from edgediffusion.profiles import latency, memory
from edgediffusion.profiles.latency import Latency
from edgediffusion.profiles.memory import Memory
from edgediffusion.runtimes.any_picture import any_picture
from edgediffusion.runtimes.pipeline import Pipeline

__all__ = ["Latency", "Memory", "Profile", "machine", "profile"]

_PICTURES = 3  # timed with a caching policy


@dataclass(frozen=True)
class Profile:
    """One bundle on one machine. ``step_ms`` is the median of the denoiser, and of its ControlNets: what one more sampling step costs.

    ``cached_step_ms`` is the mean step of a picture of the bundle's own number of steps with the policy ``cache``; None without.
    """

    machine: str
    target: str | None
    components: dict[str, Latency]
    step_ms: float
    memory: Memory
    bundle_bytes: int
    component_bytes: dict[str, int]
    cache: str | None = None
    cached_step_ms: float | None = None


def profile(
    bundle: Bundle,
    *,
    target: str | None = None,
    runs: int = 30,
    warmup: int = 3,
    steps: int = 2,
    threads: int | None = None,
    cache: str | None = None,
    progress: Callable[[str, float], None] = lambda label, part: None,
) -> Profile:
    """Measure latency of every component, peak memory of a generation of ``steps`` steps, and sizes on disk.

    With a caching policy, memory is that of a generation with it, and the mean time of its steps is measured too.
    """
    cached = None if cache is None else _cached_step_ms(bundle, cache, target, threads, progress)
    (times,) = latency.measure([bundle], target=target, runs=runs, warmup=warmup, threads=threads, progress=progress)
    progress("memory", 1.0)
    used = memory.measure(bundle, target=target, steps=steps, threads=threads, cache=cache)
    return replace(summarize(bundle, times, used, target), cache=cache, cached_step_ms=cached)


def _cached_step_ms(bundle: Bundle, cache: str, target: str | None, threads: int | None, progress: Callable[[str, float], None]) -> float:
    """The median over three pictures; before them one that is not timed."""
    pipeline = Pipeline.from_bundle(bundle, target=target, threads=threads, cache=cache)
    means = []
    for picture in range(1 + _PICTURES):
        progress("caching", picture / (1 + _PICTURES))
        times = pipeline(**any_picture(bundle), seed=picture).timings.step_ms
        means.append(sum(times) / len(times))
    return statistics.median(means[1:])


def summarize(bundle: Bundle, times: dict[str, Latency], used: Memory, target: str | None) -> Profile:
    denoisers, controls = ([times[c.name].median_ms for c in bundle.with_role(role)] for role in ("denoise", CONTROL))
    sizes = {c.name: bundle.size_bytes(f"{c.model.rsplit('/', 1)[0]}/") for c in bundle.components}
    return Profile(machine(), target, times, max(denoisers, default=0.0) + sum(controls), used, bundle.size_bytes(), sizes)


def machine() -> str:
    """Processor and cores, as a document should name them."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores"
