"""Engines against the golden outputs that the kit carries, and the time that a call takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgediffusion.errors import EngineError
from edgediffusion.runtimes.kit import BUNDLE, Kit, Progress
from edgediffusion.runtimes.kit.build import Built
from edgediffusion.runtimes.kit.worker import ask

WARMUP = 3


@dataclass(frozen=True)
class Verified:
    """``error`` is |y - r| / |r| over the outputs together; None where a number is not finite. Times are of ``runs`` calls."""

    error: float | None
    tolerance: float
    precision: str
    load_ms: float
    peak_bytes: int
    runs: int = 0
    median_ms: float = 0.0
    p90_ms: float = 0.0
    min_ms: float = 0.0
    max_ms: float = 0.0

    @property
    def good(self) -> bool:
        return self.error is not None and self.error <= self.tolerance


def verify(kit: Kit, built: Mapping[str, Built], *, runs: int = 0, progress: Progress = lambda label, part: None) -> dict[str, Verified]:
    """Run every engine on its golden inputs, and then ``runs`` times more with a clock.

    Raises:
        EngineError: an engine cannot be loaded or run.
    """
    found = {}
    for at, (name, engine) in enumerate(built.items()):

        def part_of(label: str, part: float, at: int = at) -> None:
            progress(label, (at + part) / len(built))

        golden = kit.golden[name]
        job = {
            "do": "run",
            "component": name,
            "engine": kit.engine,
            "bundle": str(kit.path / BUNDLE),
            "file": str(engine.folder / engine.file),
            "golden": str(kit.path / golden.file),
            "runs": runs,
            "warmup": WARMUP,
        }
        part_of(f"{name}: running", 0.0)
        try:
            told = ask(job, part_of)
        except EngineError as error:
            raise EngineError(f"The engine of '{name}' could not be run: {error}") from error
        found[name] = Verified(
            told["error"], golden.tolerance, golden.precision, told["load_ms"], told["peak_bytes"], **_times(told["times_ms"])
        )
    progress("done", 1.0)
    return found


def require_good(found: Mapping[str, Verified]) -> None:
    """Refuse engines that compute something else.

    Raises:
        EngineError: names them, with their errors and what is allowed.
    """
    if wrong := {name: one for name, one in found.items() if not one.good}:
        raise EngineError(
            "Engines that were built here compute something else than the graphs do",
            got="; ".join(f"{name} is off by {_said(one.error)}" for name, one in wrong.items()),
            allowed=", ".join(dict.fromkeys(f"{one.tolerance:g} in {one.precision}" for one in wrong.values())),
            do="Build them again: remove the folder 'work' and start anew. If that does not help, report it with work/results.json.",
        )


def _said(error: float | None) -> str:
    return "numbers that are not finite" if error is None else f"{error:.2g} of its outputs' norm"


def _times(times_ms: list[float]) -> dict[str, Any]:
    if not times_ms:
        return {}
    t = np.asarray(times_ms)
    at = {"median_ms": np.median(t), "p90_ms": np.percentile(t, 90), "min_ms": t.min(), "max_ms": t.max()}
    return {"runs": len(t), **{name: float(value) for name, value in at.items()}}
