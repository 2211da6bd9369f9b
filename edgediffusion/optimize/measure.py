"""From a network and its calibration items to the state of every layer: observe, balance, clip, round.

The network is a module of torch, or the bundle's own graph, for which no torch is needed: but nothing can be learned in a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from edgediffusion import registry
from edgediffusion.bundle import Bundle, Component
from edgediffusion.errors import ArgumentError
from edgediffusion.optimize.balance import Balance
from edgediffusion.optimize.balances import by_running, by_statistics
from edgediffusion.optimize.float4 import BLOCK, candidates, choose_weight_format, read_nvfp4
from edgediffusion.optimize.integers import LOW_BITS, best_weight_amax
from edgediffusion.optimize.low_rank import low_rank
from edgediffusion.optimize.observed import Observed
from edgediffusion.optimize.recipe import BITS, FLOAT4, Recipe
from edgediffusion.optimize.stages import split_items
from edgediffusion.optimize.state import LayerState, Ranges

if TYPE_CHECKING:
    import torch

Items = Sequence[tuple[int, Mapping[str, np.ndarray]]]
Progress = Callable[[str, float], None]
OUTPUT_MARGIN = 1.15  # over the observed range: what calibration has not seen would be cut, and that shows in the worst pictures


def measure(
    module: torch.nn.Module,
    items: Items,
    recipe: Recipe,
    *,
    prefix: str = "",
    seed: int = 0,
    guidance_scale: float | None = None,
    progress: Progress = lambda label, part: None,
) -> dict[str, LayerState]:
    """State of every convolution and linear layer that the items reach, by module path.

    ``items`` are sampling steps and the arrays the module was called with then, by name. Module paths are given, and
    matched by the recipe's expressions, without ``prefix``. ``guidance_scale`` is that of the deployment, where items have two
    rows.

    Raises:
        ArgumentError: a layer gives values that are no finite numbers.
    """
    from edgediffusion.optimize.clip import input_clips
    from edgediffusion.optimize.observe import observe
    from edgediffusion.optimize.rounding import Job

    by_stage = _observe_stages(lambda part, tell: observe(module, part, progress=tell), items, recipe.stages, progress)
    found, chosen, feeds = _merged(by_stage), _Named(recipe, prefix), [feed for _, feed in items]
    if recipe.balance.startswith("modelopt"):
        balances = by_running(module, feeds, found, recipe, prefix, progress=lambda part: progress("balancing", part))
    else:
        balances = by_statistics(found, recipe, prefix)
    layers = _staged(_layers(found, balances, chosen), by_stage, recipe)
    if recipe.ranges == "mse":
        few = {n: b for n in layers if (b := chosen.bits(n)[1]) <= LOW_BITS and not (chosen.excludes(n) or layers[n].is_constant)}
        few = {n: b for n, b in few.items() if chosen.formats(n)[1] not in FLOAT4}
        clips = input_clips(module, feeds, layers, found, few, progress=lambda part: progress("ranges", part))
        layers = {name: replace(layer, input_clip=clips.get(name, 1.0)) for name, layer in layers.items()}
        for stage, seen in enumerate(by_stage if recipe.stages > 1 else ()):
            own = [feed for _, feed in split_items(items, recipe.stages)[stage]]
            staged = {name: layer.of_stage(stage) for name, layer in layers.items()}
            clips = input_clips(module, own, staged, seen, few, progress=lambda part: progress("ranges of a stage", part))
            layers = {name: _clipped(layer, stage, clips.get(name, 1.0)) for name, layer in layers.items()}
    elif recipe.ranges.startswith("modelopt"):
        from edgediffusion.optimize.modelopt import calibrated

        wanted = {n: chosen.bits(n) for n in layers if not (chosen.excludes(n) or layers[n].is_constant or found[n].groups > 1)}
        layers |= calibrated(module, feeds, layers, wanted, recipe.ranges, progress=lambda part: progress("ranges", part))
    if recipe.activations in FLOAT4:
        layers |= _float4_inputs(module, feeds, layers, found, chosen, lambda part: progress("formats", part))
    rounding: ModuleType = registry.find("optimize.rounding", recipe.rounding)
    job = Job(module, feeds, dict(layers), chosen.recipe, seed, lambda part: progress("rounding weights", part), prefix, guidance_scale)
    layers.update(rounding.round_weights(job))
    if recipe.temporal == "tiar":
        from edgediffusion.optimize.temporal import tiar

        layers.update(tiar(replace(job, progress=lambda part: progress("rounding the time embedding", part))))
    return {name.removeprefix(prefix): layer for name, layer in layers.items()}


def _float4_inputs(
    module: torch.nn.Module,
    feeds: Sequence[Mapping[str, np.ndarray]],
    layers: Mapping[str, LayerState],
    found: Mapping[str, Observed],
    recipe: _Named,
    progress: Callable[[float], None],
) -> dict[str, LayerState]:
    """The layers that get four-bit floating inputs, with formats for these."""
    from edgediffusion.optimize.float4_inputs import choose_input_formats

    wanted = [n for n in layers if recipe.formats(n)[1] in FLOAT4 and not (recipe.excludes(n) or layers[n].is_constant)]
    forms = {n: candidates(recipe.formats(n)[1]) for n in wanted}
    return choose_input_formats(module, feeds, layers, found, forms, search=recipe.recipe.ranges == "mse", progress=progress)


def measure_graph(
    bundle: Bundle,
    component: Component,
    items: Items,
    recipe: Recipe,
    *,
    folder: Path | None = None,
    progress: Progress = lambda label, part: None,
) -> dict[str, LayerState]:
    """As ``measure``, of a component's graph as ONNX Runtime runs it; a copy of it lies in ``folder`` meanwhile.

    Raises:
        ArgumentError: a layer gives values that are no finite numbers, or the recipe needs a network in torch.
    """
    from edgediffusion.optimize.observers import observe_graph

    check_graph_recipe(recipe)

    def watch(part: Items, tell: Callable[[int], None]) -> dict[str, Observed]:
        return observe_graph(bundle, component, part, recipe=recipe, folder=folder, progress=tell)

    by_stage = _observe_stages(watch, items, recipe.stages, progress)
    found = _merged(by_stage)
    return _staged(_layers(found, by_statistics(found, recipe), _Named(recipe, "")), by_stage, recipe)


_Watch = Callable[[Items, Callable[[int], None]], dict[str, Observed]]


def _observe_stages(watch: _Watch, items: Items, stages: int, progress: Progress) -> list[dict[str, Observed]]:
    """What layers see, for each stage of sampling."""
    found, done = [], 0
    for part in split_items(items, stages):
        before = done
        found.append(watch(part, lambda now, before=before: progress("observing layers", (before + now) / len(items))))  # type: ignore[misc]
        done += len(part)
    return found


def _merged(by_stage: Sequence[Mapping[str, Observed]]) -> dict[str, Observed]:
    if len(by_stage) == 1:
        return dict(by_stage[0])
    return {name: Observed.merged([seen[name] for seen in by_stage]) for name in by_stage[0]}


def _staged(layers: Mapping[str, LayerState], by_stage: Sequence[Mapping[str, Observed]], recipe: Recipe) -> dict[str, LayerState]:
    """The layers with their ranges in each stage, where there are several."""
    if len(by_stage) == 1:
        return dict(layers)
    found = {}
    for name, layer in layers.items():
        stages = []
        for seen in (part[name] for part in by_stage):
            clip = mean_over_steps(seen, layer.factors) if recipe.ranges == "step-mean" else 1.0
            stages.append(Ranges(seen.input.low, seen.input.high, seen.output.low, seen.output.high, clip))
        found[name] = replace(layer, stages=tuple(stages))
    return found


def _clipped(layer: LayerState, stage: int, clip: float) -> LayerState:
    stages = list(layer.stages)
    stages[stage] = replace(stages[stage], input_clip=clip)
    return replace(layer, stages=tuple(stages))


def check_graph_recipe(recipe: Recipe) -> None:
    """Refuse a recipe with methods that work on a network in torch (ArgumentError)."""
    needs = []
    if recipe.rounding != "nearest":
        needs.append(f"rounding {recipe.rounding!r}")
    if recipe.balance.startswith("modelopt"):
        needs.append(f"balance {recipe.balance!r}")
    if recipe.effective_bits:
        needs.append(f"effective_bits {recipe.effective_bits}")
    if recipe.temporal:
        needs.append(f"temporal {recipe.temporal!r}")
    if recipe.ranges.startswith("modelopt"):
        needs.append(f"ranges {recipe.ranges!r}")
    if recipe.ranges == "mse" and BITS.get(recipe.activations, 16) <= LOW_BITS:
        needs.append(f"ranges 'mse' of {recipe.activations} activations")
    elif recipe.activations == "fp4":
        needs.append("the choice of a format for activations")
    if needs:
        raise ArgumentError(
            f"The recipe '{recipe.name}' has methods that work on the network in torch, not on a graph",
            got=", ".join(needs),
            allowed="without a source: rounding 'nearest', ranges 'max', or 'mse' if activations have 8 bits, no balance of ModelOpt's",
            do="Give the diffusers folder that the bundle was exported from: --source FOLDER",
        )


class _Named:
    """A recipe that is asked by the paths of the module, which has the network under a name of its own."""

    def __init__(self, recipe: Recipe, prefix: str):
        self.recipe, self.prefix = recipe, prefix

    def bits(self, name: str) -> tuple[int, int]:
        return self.recipe.bits(name.removeprefix(self.prefix))

    def formats(self, name: str) -> tuple[str, str]:
        return self.recipe.formats(name.removeprefix(self.prefix))

    def branches(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the layer's weight gets a branch of low rank beside it."""
        rank = self.recipe.rank
        whole = self.formats(name)[0] != "nvfp4" or shape[1] % BLOCK == 0
        return 0 < rank < min(shape) and len(shape) == 2 and self.bits(name)[0] <= LOW_BITS and whole and not self.excludes(name)

    def excludes(self, name: str) -> bool:
        return self.recipe.excludes(name.removeprefix(self.prefix)) is not None


def _layers(found: Mapping[str, Observed], balances: Mapping[str, Balance], recipe: _Named) -> dict[str, LayerState]:
    return {name: _layer(layer, balances[name], recipe, name) for name, layer in found.items()}


def _layer(layer: Observed, balance: Balance, recipe: _Named, name: str) -> LayerState:
    factors, up, down = balance.factors, balance.up, balance.down
    weight = balanced_weight(layer.weight, factors, layer.groups)
    bits, form = recipe.bits(name)[0], recipe.formats(name)[0]
    groups = recipe.recipe.groups(weight.shape)
    importance = (layer.input.mean_square / factors.astype(np.float64) ** 2).reshape(1, -1, *[1] * (weight.ndim - 2))
    if up is None and recipe.branches(name, weight.shape):
        up, down = low_rank(weight, recipe.recipe.rank, bits, importance, read=read_nvfp4 if form == "nvfp4" else None)
    if up is not None and down is not None:
        weight = weight - up @ down
    rows = weight.reshape(len(weight) * groups, -1)
    amax, formats = np.abs(rows).max(1), ("", "")
    if form in FLOAT4 and not recipe.excludes(name):
        counts = importance if layer.groups == 1 else np.ones(1)
        form, amax = choose_weight_format(weight, counts, candidates(form), search=recipe.recipe.ranges == "mse")
        formats = (form, "")
    elif recipe.recipe.ranges == "mse" and bits <= LOW_BITS and layer.groups == 1:
        amax = best_weight_amax(rows, np.broadcast_to(importance, weight.shape).reshape(rows.shape), bits)
    amax = amax.reshape(-1, groups) if groups > 1 else amax
    seen, given = layer.input, layer.output
    bounds = (seen.low, seen.high, given.low, given.high)
    clip = mean_over_steps(layer, factors) if recipe.recipe.ranges == "step-mean" else 1.0
    return LayerState(factors, *bounds, amax.astype(np.float32), clip, OUTPUT_MARGIN, up=up, down=down, formats=formats)


def mean_over_steps(layer: Observed, factors: np.ndarray) -> float:
    """Mean of the largest |x / f| of each sampling step, over the largest of all.

    NVIDIA's percentile calibrator for diffusion (in TensorRT's demo and ModelOpt's examples) reduces the first part of the sorted
    steps by their mean; the demos take all of them (METHODS 2.6), as is done here.
    """
    by_step = [float((amax / factors).max()) for amax in layer.steps.values()]
    return float(np.mean(by_step)) / max(*by_step, 1e-12)


def balanced_weight(weight: np.ndarray, factors: np.ndarray, groups: int = 1) -> np.ndarray:
    """f w of a weight [out, in, ...]."""
    if groups > 1:
        return weight
    scaled: np.ndarray = weight * factors.reshape(1, -1, *[1] * (weight.ndim - 2))
    return scaled
