"""Profiles: what was measured on this machine, never what should be."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgediffusion.bundle import Bundle
from edgediffusion.profiles import latency, memory
from edgediffusion.profiles.latency import Latency
from edgediffusion.profiles.memory import Memory

__all__ = ["Latency", "Memory", "Profile", "machine", "profile"]


@dataclass(frozen=True)
class Profile:
    """One bundle on one machine. ``step_ms`` is the denoiser's median: what one more sampling step costs."""

    machine: str
    target: str | None
    components: dict[str, Latency]
    step_ms: float
    memory: Memory
    bundle_bytes: int
    component_bytes: dict[str, int]


def profile(
    bundle: Bundle,
    *,
    target: str | None = None,
    runs: int = 30,
    warmup: int = 3,
    steps: int = 2,
    threads: int | None = None,
    progress: Callable[[str, float], None] = lambda label, part: None,
) -> Profile:
    """Measure latency of every component, peak memory of a generation of ``steps`` steps, and sizes on disk."""
    (times,) = latency.measure([bundle], target=target, runs=runs, warmup=warmup, threads=threads, progress=progress)
    progress("memory", 1.0)
    return summarize(bundle, times, memory.measure(bundle, target=target, steps=steps, threads=threads), target)


def summarize(bundle: Bundle, times: dict[str, Latency], used: Memory, target: str | None) -> Profile:
    denoisers = [times[c.name].median_ms for c in bundle.with_role("denoise")]
    sizes = {c.name: bundle.size_bytes(f"{c.model.rsplit('/', 1)[0]}/") for c in bundle.components}
    return Profile(machine(), target, times, max(denoisers, default=0.0), used, bundle.size_bytes(), sizes)


def machine() -> str:
    """Processor and cores, as a document should name them."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores"
