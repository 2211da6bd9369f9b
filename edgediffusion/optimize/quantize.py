"""Quantize: a bundle's denoiser with explicit Q/DQ and int8 weights, the rest of the bundle as it was."""

from __future__ import annotations

import filecmp
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgediffusion import __version__, files, targets
from edgediffusion.bundle import Bundle, Component, Verb, write
from edgediffusion.errors import ArgumentError
from edgediffusion.files import link_or_copy
from edgediffusion.optimize.cuts import Given, cut_again, parts_of
from edgediffusion.optimize.finite import check_quantized
from edgediffusion.optimize.graph_file import WEIGHTS, load_graph, store_weights
from edgediffusion.optimize.recipe import Placement, Recipe, load_placement, load_recipe, recipe_of
from edgediffusion.optimize.sensitivity_report import Sensitivity
from edgediffusion.optimize.state import LayerState, QuantizationState, weights_digest

if TYPE_CHECKING:
    from edgediffusion.optimize.passes.insert_qdq import Report

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class _Job:
    state: QuantizationState
    recipe: Recipe
    placement: Placement
    kept: Mapping[str, str] = field(default_factory=dict)  # layers that a sensitivity report keeps float, with its reasons


def quantize(
    bundle: Bundle,
    state: str | Path | QuantizationState,
    output: str | Path,
    *,
    recipe: str | Recipe | None = None,
    target: str = "cpu-x86-64",
    placement: str | Placement | None = None,
    sensitivity: str | Path | Sensitivity | None = None,
    progress: Progress = lambda label, part: None,
) -> Bundle:
    """Write the bundle with its denoiser quantized as ``recipe`` says, with Q/DQ nodes where ``target``'s engine wants them.

    ``recipe`` is by default the one that the state was made for, ``placement`` the target's; both and ``target`` are names or
    paths of TOML files. ``sensitivity`` is a report whose choice of layers stays float too. Which layers stayed float, and
    why, is in the new bundle's history.

    Raises:
        UnknownName: no such recipe, target or placement. ArgumentError: the state belongs to other weights or does not serve the
        recipe, the engine lacks the recipe's number formats, or the report was made for something else.
        BundleError: the quantized graph gives numbers that are not finite; the message names the layer.
        OutputError: ``output`` exists or cannot be written.
    """
    device, chosen = targets.load(target), bundle.with_role("denoise")
    job = _settle(bundle, state, recipe, device, placement, sensitivity)
    cut_out = parts_of(bundle, chosen, stages=len(job.state.below) + 1)
    with files.new_folder(Path(output)) as folder:
        replaced = {component.model.rsplit("/", 1)[0] + "/" for component in (*chosen, *cut_out)}
        kept = [name for name in bundle.files if not name.startswith("engines/") and not _is_replaced(name, replaced)]
        for name in kept:
            link_or_copy(bundle.path / name, folder / name)
        report: dict[str, object] = {}
        components: list[Component] = []
        for component in bundle.components:
            if component not in chosen:
                components.append(component)
                continue
            # A graph of another placement is for an engine that is not the target's, and is not run here.
            engine = device.engines[0] if job.placement.name == device.placement else None
            for part, layers in _quantize_component(bundle, component, folder, job, engine, progress):
                components.append(part)
                report[part.name] = layers
        progress("writing", 1.0)
        components = cut_again(cut_out, components, folder)
        arguments = {
            "recipe": job.recipe.name,
            "target": device.name,
            "placement": job.placement.name,
            "state": job.state.digest,
            "layers": report,
        }
        versions = {"edgediffusion": __version__, "onnx-ir": version("onnx-ir")}
        write(
            folder,
            family=bundle.family,
            components=tuple(components),
            sampling=bundle.sampling,
            history=(*bundle.history, Verb("quantize", arguments, versions)),
            known={name: bundle.files[name] for name in kept},
        )
    return Bundle.open(output, verify=False)


def _settle(
    bundle: Bundle,
    state: str | Path | QuantizationState,
    recipe: str | Recipe | None,
    device: targets.Target,
    placement: str | Placement | None,
    sensitivity: str | Path | Sensitivity | None,
) -> _Job:
    """Everything loaded, and everything refused that can be refused without a graph; errors as in ``quantize``."""
    known = state if isinstance(state, QuantizationState) else QuantizationState.load(state)
    job = _Job(known, recipe_for(known, recipe), load_placement(placement or device.placement))
    check_formats(job.recipe, job.placement)
    if job.placement.name == device.placement:
        check_device(job.recipe, device)
    for component in bundle.with_role("denoise"):
        check_weights(bundle, component, job.state)
    if sensitivity is None:
        return job
    report = sensitivity if isinstance(sensitivity, Sensitivity) else Sensitivity.load(sensitivity)
    wanted = {"recipe": job.recipe.name, "target": device.name, "placement": job.placement.name}
    report.check(weights=known.weights, state=known.digest, **wanted)
    return replace(job, kept=report.kept)


def recipe_for(state: QuantizationState, wanted: str | Recipe | None) -> Recipe:
    """The state's own recipe, or another one that its ranges and codes serve."""
    own = recipe_of(state.recipe)
    if wanted is None:
        return own
    recipe = load_recipe(wanted)
    fields = (
        "weights",
        "activations",
        "balance",
        "ranges",
        "rounding",
        "group",
        "rank",
        "stages",
        "float_last",
        "dynamic",
        "eight",
        "split",
        "rotate",
    )
    differing = [field for field in fields if getattr(recipe, field) != getattr(own, field)]
    if differing:
        raise ArgumentError(
            f"The quantization state was made for the recipe '{own.name}', which differs from '{recipe.name}'",
            got=", ".join(f"{field} {getattr(own, field)!r} for {getattr(recipe, field)!r}" for field in differing),
            do=f"Calibrate for it: edgediffusion calibrate BUNDLE --source SOURCE --recipe {recipe.name} -o STATE",
        )
    return recipe


def check_formats(recipe: Recipe, placement: Placement) -> None:
    """Refuse number formats that the engine has no kernels for: such a graph fails when it is loaded, or is slower than float."""
    lacking = sorted({recipe.weights, recipe.activations} - {"float", *placement.formats})
    if recipe.dynamic and recipe.dynamic not in placement.dynamic:
        lacking.append(f"dynamic = {recipe.dynamic!r}")
    if lacking:
        ways = [f"dynamic = {way!r}" for way in placement.dynamic]
        raise ArgumentError(
            f"The engine of the placement '{placement.name}' has no kernels for what the recipe '{recipe.name}' asks for",
            got=", ".join(lacking),
            allowed=", ".join([*placement.formats, *ways]),
            do="Choose another recipe, or a target whose engine has them: edgediffusion targets. To see the pictures alone, computed in "
            "float by any engine: --placement simulated",
        )


def check_device(recipe: Recipe, device: targets.Target) -> None:
    """Refuse floating formats that the engine has kernels for, but not on this device (ArgumentError)."""
    names = {"fp8": "fp8", "nvfp4": "fp4"}  # of recipes, and of targets
    lacking = sorted(f for f in {recipe.weights, recipe.activations} if f in names and names[f] not in device.formats)
    if lacking:
        raise ArgumentError(
            f"The target '{device.name}' has no kernels for what the recipe '{recipe.name}' asks for",
            got=", ".join(lacking),
            allowed=", ".join(device.formats),
            do="Choose another recipe or target, or see the pictures alone: --placement simulated",
        )


def _is_replaced(name: str, folders: set[str]) -> bool:
    return not name.endswith((".json", ".txt")) and any(name.startswith(folder) for folder in folders)


def check_weights(bundle: Bundle, component: Component, state: QuantizationState) -> None:
    """Refuse a state of other weights, and a bundle that is quantized already (ArgumentError)."""
    if any(verb.name == "quantize" for verb in bundle.history):
        raise ArgumentError(f"The bundle '{bundle.path}' is quantized already", do="Quantize the float bundle it was made from.")
    if weights_digest(bundle, component) != state.weights:
        raise ArgumentError(
            f"The quantization state belongs to other weights than the bundle's '{component.name}'",
            do="Calibrate this bundle: edgediffusion calibrate BUNDLE --source SOURCE -o STATE",
        )


def stage_components(component: Component, below: Sequence[float]) -> tuple[Component, ...]:
    """A denoiser for each stage of sampling: itself, and one that takes over below each of the time steps."""
    file = component.model.rsplit("/", 1)[-1]
    later = [(f"{component.name}_{at}", t) for at, t in enumerate(below, 2)]
    return (component, *(replace(component, name=name, model=f"{name}/{file}", below=t) for name, t in later))


def _quantize_component(
    bundle: Bundle, component: Component, folder: Path, job: _Job, engine: str | None, progress: Progress
) -> list[tuple[Component, dict[str, object]]]:
    """Write a denoiser's quantized graphs, one for each stage; what became of their layers. ``engine`` runs each once."""
    every = stage_components(component, job.state.below)
    parts, last = (every[:-1], every[-1:]) if job.recipe.float_last else (every, ())
    found = []
    for stage, part in enumerate(parts):
        progress(f"quantizing {part.name}", stage / len(parts))
        found.append((part, _quantize_graph(bundle, component, part, stage, folder, job)))
        if engine is not None:
            progress(f"checking {part.name}", (stage + 0.5) / len(parts))
            check_quantized(bundle, component, folder / part.model, engine)
    _share_weights([(folder / part.model).parent / WEIGHTS for part in parts])
    return [*found, *((part, _float_part(bundle, component, part, folder)) for part in last)]


def _float_part(bundle: Bundle, component: Component, part: Component, folder: Path) -> dict[str, object]:
    """Write ``part``, the denoiser of the last steps: the float one as it is, linked."""
    before, after = (f"{c.model.rsplit('/', 1)[0]}/" for c in (component, part))
    for name in bundle.files:
        if name.startswith(before) and not name.endswith((".json", ".txt")):
            (folder / after).mkdir(exist_ok=True)
            link_or_copy(bundle.path / name, folder / after / name.removeprefix(before))
    return {"quantized": 0, "float": {"": "the recipe keeps the last steps float"}}


def _share_weights(stored: Sequence[Path]) -> None:
    """Let stages whose weights are the same have one file of them."""
    for other in stored[1:]:
        if filecmp.cmp(stored[0], other, shallow=False):
            other.unlink()
            link_or_copy(stored[0], other)


def _quantize_graph(bundle: Bundle, component: Component, part: Component, stage: int, folder: Path, job: _Job) -> dict[str, object]:
    """Write ``part``, the quantized graph of ``component`` for a stage of sampling."""
    import onnx_ir as ir

    prefix = f"{component.name}/"
    layers = {name.removeprefix(prefix): layer for name, layer in job.state.layers.items() if name.startswith(prefix)}
    states = {name: layer.of_stage(stage) for name, layer in layers.items()}
    model = load_graph(bundle.path / component.model)
    given = Given(model.graph)
    _prepare(model, job.recipe)
    report = quantize_model(model, {n: s for n, s in states.items() if n not in job.kept}, job.recipe, job.placement)
    given.restore()
    target = folder / part.model
    target.parent.mkdir(exist_ok=True)
    store_weights(model, target.parent)
    ir.save(model, target)
    return {"quantized": len(report.quantized), "float": {name: job.kept.get(name, reason) for name, reason in report.declined.items()}}


def quantize_model(model: Any, states: Mapping[str, LayerState], recipe: Recipe, placement: Placement) -> Report:
    """Quantize a prepared graph in place: the layers of ``states`` that the recipe does not keep float."""
    from edgediffusion.optimize.passes.add_low_rank import add_low_rank, places
    from edgediffusion.optimize.passes.insert_qdq import insert_qdq

    branches = places(model, states)
    report = insert_qdq(model, states, recipe, placement)
    add_low_rank(model, [branch for branch in branches if branch.name in report.quantized])
    return report


def prepared_graph(file: Path, recipe: Recipe) -> Any:
    """A float graph with the layers that a recipe quantizes. It gives the prediction and nothing for cuts, which are no layers."""
    model = load_graph(file)
    del model.graph.outputs[1:]
    _prepare(model, recipe)
    return model


def _prepare(model: Any, recipe: Recipe) -> None:
    """Split and rotate layers where the recipe asks for that."""
    from edgediffusion.optimize.passes.rotate import rotatable, rotate
    from edgediffusion.optimize.passes.split_concat import joined, split_concat

    split_concat(model, joined(model, recipe))
    rotate(model, rotatable(model, recipe))
