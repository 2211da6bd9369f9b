"""Graphs of one denoiser with any choice of its layers float: built, run beside the float one, and timed in turn with it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgediffusion.bundle import Bundle, Component
from edgediffusion.optimize.finite import bind, check_finite, write
from edgediffusion.optimize.graph_file import store_weights
from edgediffusion.optimize.quantize import prepared_graph, quantize_model
from edgediffusion.optimize.recipe import Placement, Recipe
from edgediffusion.optimize.sensitivity_plan import Steps
from edgediffusion.optimize.sensitivity_times import (
    MarkedGraph,
    Measured,
    difference_noise,
    marked_float,
    marked_quantized,
    ratio,
    time_in_turn,
)
from edgediffusion.optimize.state import LayerState
from edgediffusion.runtimes.engines import Binding

Feeds = Mapping[str, np.ndarray]
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Trial:
    """``error`` is of the guided prediction, relative (root mean squares over all items); ratios are of a step's time, to that of the
    float graph and to that of the graph with every layer quantized."""

    error: float
    ratio: Measured
    to_quantized: Measured


class Bench:
    """What is measured of a choice is measured once."""

    def __init__(
        self,
        bundle: Bundle,
        component: Component,
        states: Mapping[str, LayerState],
        recipe: Recipe,
        placement: Placement,
        engine: Any,
        items: Sequence[Feeds],
        guidance_scale: float | None,
        folder: Path,
    ):
        self._component, self._engine, self._items, self._folder = component, engine, items, folder
        self._states, self._recipe, self._placement = states, recipe, placement
        self._guidance_scale = guidance_scale
        self._float = bundle.path / component.model
        self._trials: dict[frozenset[str], Trial] = {}
        self._built = 0

    def open(self, *, runs: int, threads: int | None) -> None:
        """Load the float graph and the one with every layer quantized.

        Raises:
            BundleError: a layer of the latter gives numbers that are not finite; the message names it.
        """
        self._runs, self._threads = runs, threads
        self.marked: MarkedGraph = marked_quantized(self._float, self._states, self._recipe, self._placement)
        self._reference = bind(self._engine, self._component, self._float, self._items[0], threads=threads)
        self._predictions = self._run(self._reference)
        self._all = self._open(frozenset())

    def trial(self, kept: frozenset[str]) -> Trial:
        """Measure the graph with the layers ``kept`` float."""
        if kept not in self._trials:
            binding = self._open(kept) if kept else self._all
            error = self._error(binding)
            times = time_in_turn((self._reference, self._all, binding), self._runs)
            self._trials[kept] = Trial(error, ratio(times[2], times[0]), ratio(times[2], times[1]))
        return self._trials[kept]

    def known(self, kept: frozenset[str]) -> Trial | None:
        return self._trials.get(kept)

    def errors(self, names: Sequence[str], progress: Progress) -> dict[str, float]:
        """The relative error with one layer quantized, for each of ``names``: a graph for each."""
        found = {}
        for done, name in enumerate(names):
            found[name] = self._error(self._open(self.marked.quantized - {name}))
            progress("errors by layer", (done + 1) / len(names))
        return found

    def times(self, progress: Progress) -> dict[str, tuple[float, float, float]]:
        """Milliseconds of each layer, float and quantized, and the standard error of their difference; sets ``steps``."""
        import onnx_ir as ir

        progress("times by layer", 0.0)
        graphs = (marked_float(self._float, self._recipe), self.marked)
        files = []
        for graph, name in zip(graphs, ("float", "quantized"), strict=True):
            folder = self._folder / f"marked-{name}"
            folder.mkdir()
            store_weights(graph.model, folder)
            files.append(folder / "model.onnx")
            ir.save(graph.model, files[-1])
        profiles = self._engine.time_nodes(files, self._items[0], runs=self._runs, threads=self._threads)
        self.steps = Steps(*(sum(float(np.median(node.times_ms)) for node in nodes) for nodes in profiles))
        before, after = (graph.times(nodes) for graph, nodes in zip(graphs, profiles, strict=True))
        progress("times by layer", 1.0)
        both = [name for name in before if name in after]
        medians = {name: (float(np.median(before[name])), float(np.median(after[name]))) for name in both}
        return {name: (*medians[name], difference_noise(before[name], after[name])) for name in both}

    def _open(self, kept: Collection[str]) -> Binding:
        """The engine has read the file when it is removed."""
        import onnx_ir as ir

        folder = self._folder / str(self._built)
        self._built += 1
        folder.mkdir()
        model = prepared_graph(self._float, self._recipe)
        quantize_model(model, {name: state for name, state in self._states.items() if name not in kept}, self._recipe, self._placement)
        store_weights(model, folder)
        file = folder / Path(self._component.model).name
        ir.save(model, file)
        binding: Binding = bind(self._engine, self._component, file, self._items[0], threads=self._threads)
        if not kept:
            check_finite(self._engine, self._component, file, self._float, self._items)
        shutil.rmtree(folder, ignore_errors=True)
        return binding

    def _error(self, binding: Binding) -> float:
        pairs = zip(self._run(binding), self._predictions, strict=True)
        square = sum(float(np.square(found - expected).sum()) for found, expected in pairs)
        return float(np.sqrt(square / max(sum(float(np.square(p).sum()) for p in self._predictions), 1e-30)))

    def _run(self, binding: Binding) -> list[np.ndarray]:
        """The guided prediction of every item, float64."""
        found = []
        for item in self._items:
            write(binding, item)
            binding.run()
            prediction = next(iter(binding.outputs.values()))  # the float graph may give features for cuts behind it
            found.append(guided(prediction.astype(np.float64), self._guidance_scale))
        write(binding, self._items[0])
        return found


def guided(prediction: np.ndarray, guidance_scale: float | None) -> np.ndarray:
    """u + g (c - u) of two rows, the unconditional one first; other predictions as they are."""
    if guidance_scale is None or len(prediction) != 2:
        return prediction
    return np.asarray(prediction[:1] + guidance_scale * (prediction[1:] - prediction[:1]))
