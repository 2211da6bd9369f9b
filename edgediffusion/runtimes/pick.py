"""Which engine serves a component: each that could is built and timed on the spot, and the fastest that is exact enough wins.

Candidates are the target's engines and, where an engine lets one choose, the precisions that the target has kernels for. Those of a
component take turns in one process, so that what disturbs one disturbs all; the table says what each took and how far it was off.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgediffusion.bundle import Component, Sampling, TensorSpec
from edgediffusion.errors import EngineError, MissingExtra
from edgediffusion.registry import find
from edgediffusion.runtimes.engines import resolve
from edgediffusion.runtimes.graph import Graph
from edgediffusion.runtimes.sizes import Sizes
from edgediffusion.targets import Target

Progress = Callable[[str, float], None]
MAX_ERROR = 1e-3  # of what a graph gives, relative to its norm: float32 engines differ by some 1e-6, bfloat16 is off by some 1e-2
_FEWEST_RUNS, _LONGEST_S = 5, 2.0  # of each candidate
_PRECISIONS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Trial:
    """One candidate for a component: ``median_ms`` of one call at the usual sizes; ``error`` is |y - r| / |r| over the outputs together, r
    being those of the ONNX file in the reference engine. ``refused`` says why it did not come to that, or why it may not win."""

    component: str
    engine: str
    precision: str
    median_ms: float = 0.0
    error: float = 0.0
    refused: str = ""
    chosen: bool = False


@dataclass(frozen=True)
class _Built:
    trial: Trial
    file: Path
    binding: Any


def candidates(target: Target, precision: str | None) -> tuple[tuple[str, str], ...]:
    """Engine and precision, in the target's order; "" where the engine has no choice. ``precision`` is the only one where it is given."""
    found = []
    for name in target.engines:
        choice = "precision" in getattr(find("runtimes.engines", name), "options", ())
        able = [precision] if precision else [p for p in _PRECISIONS if p in target.formats]
        found += [(name, p) for p in able] if choice else [(name, "")]
    return tuple(found)


def pick(
    component: Component,
    model: Path,
    place: Path,
    build_one: Callable[[str, str, Path], None],
    options: Sequence[tuple[str, str]],
    *,
    sampling: Sampling | None,
    sizes: Sizes,
    max_error: float = MAX_ERROR,
    threads: int | None = None,
    progress: Progress = lambda label, part: None,
) -> tuple[str, tuple[Trial, ...]]:
    """Build every candidate into a folder of ``place``, time them in turn, and leave the winner's files in ``place``.

    ``build_one(engine, precision, file)`` builds one. The reference is the ONNX file in the first engine that can open it. Returns the
    winner's file name and the table, in the order of ``options``.

    Raises:
        EngineError: no candidate could be built and run, or none is exact enough; the message has every reason.
    """
    feeds = call_inputs(component, sampling, sizes)
    expected = _reference(component, model, options, feeds, threads)
    made: list[_Built | Trial] = []
    for at, (engine, precision) in enumerate(options):
        progress(f"{component.name}: {engine} {precision}".rstrip(), at / (len(options) + 1))
        made.append(_candidate(component, place / f"{at}", build_one, engine, precision, feeds, threads))
    running = [entry for entry in made if isinstance(entry, _Built)]
    progress(f"{component.name}: timing", len(options) / (len(options) + 1))
    times = _in_turns([entry.binding for entry in running])
    for entry, median_ms in zip(running, times, strict=True):
        error = _error(entry.binding.outputs, expected)
        refused = "" if error <= max_error else f"off by {error:.2g}, more than {max_error:g}"
        made[made.index(entry)] = replace(entry, trial=replace(entry.trial, median_ms=median_ms, error=error, refused=refused))
    able = [entry for entry in made if isinstance(entry, _Built) and not entry.trial.refused]
    if not able:
        reasons = [entry.trial if isinstance(entry, _Built) else entry for entry in made]
        told = "; ".join(f"{trial.engine} {trial.precision}: {trial.refused}".replace(" :", ":") for trial in reasons)
        raise EngineError(f"No engine of the target serves the component '{component.name}'", got=told)
    winner = min(able, key=lambda entry: entry.trial.median_ms)
    trials = tuple(replace(e.trial, chosen=e is winner) if isinstance(e, _Built) else e for e in made)
    for file in sorted(winner.file.parent.iterdir()):
        file.rename(place / file.name)
    for at in range(len(options)):
        shutil.rmtree(place / f"{at}")
    return winner.file.name, trials


def call_inputs(component: Component, sampling: Sampling | None, sizes: Sizes) -> dict[str, np.ndarray]:
    """Inputs of one call at the usual sizes: normal noise, token ids of 0, a time step from the middle of the schedule."""
    rng = np.random.default_rng(0)
    axes = {axis: size.usual for axis, size in sizes.items()}
    middle = sampling.schedule.train_steps / 2 if sampling is not None else 0.0

    def value(spec: TensorSpec) -> np.ndarray:
        shape = resolve(spec, axes)
        if spec.name == "timestep":
            return np.full(shape, middle, spec.dtype)
        return rng.standard_normal(shape).astype(spec.dtype) if np.dtype(spec.dtype).kind == "f" else np.zeros(shape, spec.dtype)

    return {spec.name: value(spec) for spec in component.inputs}


def _candidate(
    component: Component,
    folder: Path,
    build_one: Callable[[str, str, Path], None],
    engine_name: str,
    precision: str,
    feeds: Mapping[str, np.ndarray],
    threads: int | None,
) -> _Built | Trial:
    trial = Trial(component.name, engine_name, precision)
    engine = find("runtimes.engines", engine_name)
    folder.mkdir()
    file = folder / (component.name + engine.suffix)
    try:
        build_one(engine_name, precision, file)
        binding = Graph(component, engine.open_session(file, threads=threads)).bind({name: array.shape for name, array in feeds.items()})
        _run(binding, feeds)
    except (EngineError, MissingExtra) as error:
        return replace(trial, refused=str(error))
    return _Built(trial, file, binding)


def _reference(
    component: Component, model: Path, options: Sequence[tuple[str, str]], feeds: Mapping[str, np.ndarray], threads: int | None
) -> dict[str, np.ndarray]:
    """What the ONNX file gives, by the first engine that is here and opens ONNX files."""
    reasons = []
    for name in dict.fromkeys((*(engine for engine, _ in options), "onnxruntime")):
        engine = find("runtimes.engines", name)
        if not getattr(engine, "reads_onnx", True):
            continue
        try:
            session = engine.open_session(model, threads=threads)
            binding = Graph(component, session).bind({key: array.shape for key, array in feeds.items()})
            _run(binding, feeds)
            return {key: array.copy() for key, array in binding.outputs.items()}
        except (EngineError, MissingExtra) as error:
            reasons.append(str(error))
    raise EngineError(f"Nothing here can say what '{component.name}' should give", got="; ".join(reasons) or "no engine reads ONNX files")


def _run(binding: Any, feeds: Mapping[str, np.ndarray]) -> None:
    for name, array in feeds.items():
        binding.inputs[name][...] = array
    binding.run()


def _in_turns(bindings: Sequence[Any]) -> list[float]:
    """Median milliseconds of each, which take turns until the slowest has had its time."""
    times: list[list[float]] = [[] for _ in bindings]
    begun = time.perf_counter()
    while bindings and (len(times[0]) < _FEWEST_RUNS or time.perf_counter() - begun < _LONGEST_S * len(bindings)):
        for binding, taken in _turns(bindings, times):
            started = time.perf_counter()
            binding.run()
            taken.append(1e3 * (time.perf_counter() - started))
    return [float(np.median(taken)) for taken in times]


def _turns(bindings: Sequence[Any], times: Sequence[list[float]]) -> Iterator[tuple[Any, list[float]]]:
    """The candidates in an order that turns round every time: who comes behind whom should not matter."""
    pairs = list(zip(bindings, times, strict=True))
    return iter(pairs if len(times[0]) % 2 == 0 else pairs[::-1])


def _error(outputs: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    square = sum(float(np.sum((outputs[n].astype(np.float64) - e.astype(np.float64)) ** 2)) for n, e in expected.items())
    norm = sum(float(np.sum(e.astype(np.float64) ** 2)) for e in expected.values())
    error = (square / norm) ** 0.5 if norm else square**0.5
    return error if np.isfinite(error) else float("inf")
