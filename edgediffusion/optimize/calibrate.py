"""Calibrate: draw with the float bundle, keep what the denoiser was fed, and find the ranges of its layers.

Layers are observed in the bundle's own graph by ONNX Runtime or, where the source is given, in its network by torch: that is
what recipes need whose methods learn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgediffusion.bundle import CONTROL, Bundle, Component
from edgediffusion.errors import ArgumentError, OutputError
from edgediffusion.optimize import parts
from edgediffusion.optimize.items import Drawing, Drawn, Tell, check_drawing, draw_items
from edgediffusion.optimize.measure import check_graph_recipe, measure, measure_graph
from edgediffusion.optimize.recipe import Recipe, load_recipe
from edgediffusion.optimize.stages import Items, boundaries, without_last
from edgediffusion.optimize.state import LayerState, QuantizationState, weights_digest
from edgediffusion.registry import find

if TYPE_CHECKING:
    from edgediffusion.export.source import Source

Progress = Callable[[str, float], None]
PROMPTS = "prompts.txt"


def calibrate(
    bundle: Bundle,
    *,
    output: str | Path,
    source: str | Path | None = None,
    strategy: str = "uniform",
    samples: int = 128,
    steps: int | None = None,
    seed: int = 0,
    prompts: Sequence[str] | None = None,
    guidance_scale: float | None = None,
    sampler: str | None = None,
    cache: str | None = None,
    recipe: str | Recipe = "int8",
    options: Mapping[str, object] | None = None,
    tell: Tell = lambda line: None,
    progress: Progress = lambda label, part: None,
) -> QuantizationState:
    """Find the ranges of the denoiser's layers and write them to ``output``.

    ``samples`` items are drawn with the sampler, steps and guidance of the deployment (by default the bundle's own), and under the
    caching policy ``cache`` that it will have, at the steps that ``strategy`` chooses, a name with ``options``. ``source`` is the
    diffusers folder that the bundle was exported from: with it, layers are observed by torch; without, by ONNX Runtime, which serves
    recipes that learn nothing. ``prompts`` are by default the lines of ``prompts.txt`` in the source, or in the bundle. A run that
    was stopped keeps its finished batches beside ``output``; the same call goes on from them and ends in the same bytes. ``recipe``
    is a name, the path of a TOML file, or a Recipe: number formats, and the methods that find their parameters. ``tell`` gets
    sentences for a person, such as that it did.

    Raises:
        UnknownName: no such strategy, sampler or recipe. ArgumentError: samples, steps, prompts or options that cannot be used, the
        bundle is of another source, or the recipe needs one. Cancelled: Ctrl-C, where finished batches are kept.
        OutputError: ``output`` exists. MissingExtra: the extra ``optimize`` is not installed.
    """
    chosen = load_recipe(recipe)
    if Path(output).exists():
        raise OutputError(f"The output '{output}' exists already", do="Choose another name, or remove it first.")
    _denoisers(bundle)
    origin = None if source is None else _source(Path(source))
    if origin is None:
        check_graph_recipe(chosen)
    texts = list(prompts) if prompts is not None else read_prompts(bundle.path if source is None else Path(source))
    drawing = Drawing(strategy, samples, steps, seed, guidance_scale, sampler, options or {}, cache)
    check_drawing(drawing, texts)  # before all weights are read for their hashes
    if origin is not None:
        _same_source(bundle, origin)
    with parts.beside(Path(output)) as keep:
        drawn = draw_items(bundle, texts, drawing, keep=keep, tell=tell, progress=progress)
        state = state_of(bundle, origin, drawn, chosen, folder=keep, progress=progress)
        state.save(Path(output))
    return state


def state_of(
    bundle: Bundle,
    source: Source | None,
    drawn: Drawn,
    recipe: Recipe,
    *,
    folder: Path | None = None,
    progress: Progress = lambda label, part: None,
) -> QuantizationState:
    """The state of the bundle's denoiser for a recipe, from items that are drawn already.

    ``source`` is the opened source that the bundle was exported from; without it, the bundle's graph is observed, and a copy
    of it, its weights linked, lies in ``folder`` meanwhile.

    Raises:
        ArgumentError: a layer gives values that are no finite numbers, or the recipe needs a source.
    """
    (component,) = _denoisers(bundle)
    every = [(item.step, item.feeds) for item in drawn.items]
    items, last = without_last(every, len(drawn.record["counts"]) if recipe.float_last else 0, recipe.float_last)
    if source is None:
        layers = measure_graph(bundle, component, items, recipe, folder=folder, progress=progress)
        observer, versions = "onnxruntime", {"onnxruntime": find("runtimes.engines", "onnxruntime").version()}
    else:
        layers, recipe = _measure(source, component, bundle.path / component.model, items, drawn.record, recipe, progress)
        used = ("torch", "diffusers", *(("nvidia-modelopt",) if _asks_modelopt(recipe) else ()))
        observer, versions = "torch", {tool: version(tool) for tool in used}
    return QuantizationState(
        weights=weights_digest(bundle, component),
        calibration={**drawn.record, "observer": observer},
        layers={f"{component.name}/{name}": layer for name, layer in layers.items()},
        recipe=recipe.to_json(),
        below=(*boundaries(items, recipe.stages), *last),
        versions=versions,
    )


def _asks_modelopt(recipe: Recipe) -> bool:
    return bool(recipe.effective_bits) or "modelopt" in recipe.balance + recipe.ranges


def _measure(
    source: Source, component: Component, graph: Path, items: Items, record: Mapping[str, Any], recipe: Recipe, progress: Progress
) -> tuple[dict[str, LayerState], Recipe]:
    """The layers of a source's network, and the recipe with the formats that were chosen for them where it asks for that."""
    from edgediffusion.export.families import family_of
    from edgediffusion.optimize.prepare import prepare_module

    part = next(p for p in family_of(source)[1].parts(source) if p.name == component.name)
    network = source.load(part.network)
    module = part.wrap(network)
    prefix = next(f"{name}." for name, child in module.named_children() if child is network)
    prepare_module(module, graph, recipe, prefix)
    guidance, seed = float(record["guidance_scale"]), int(record["seed"])
    if recipe.effective_bits:
        from edgediffusion.optimize.modelopt_formats import choose_formats

        feeds = [feed for _, feed in items]
        recipe = choose_formats(module, feeds, recipe, prefix=prefix, seed=seed, guidance_scale=guidance, progress=progress)
    return measure(module, items, recipe, prefix=prefix, seed=seed, guidance_scale=guidance, progress=progress), recipe


def _denoisers(bundle: Bundle) -> tuple[Component, ...]:
    if any(verb.name == "quantize" for verb in bundle.history):
        raise ArgumentError(f"The bundle '{bundle.path}' is quantized already", do="Calibrate the float bundle it was made from.")
    found = bundle.with_role("denoise")
    if len(found) != 1:
        raise ArgumentError("Calibration needs a bundle with one denoiser", got=f"{len(found)} of them")
    if led := bundle.with_role(CONTROL):
        raise ArgumentError(
            "Calibration has no pictures to lead a ControlNet with",
            got=", ".join(component.name for component in led),
            do="Export the pipeline without it and calibrate that bundle: its state is of the same weights, and serves this one too.",
        )
    return found


def _source(folder: Path) -> Source:
    from edgediffusion.export.source import Source

    return Source.open(folder)


def _same_source(bundle: Bundle, source: Source) -> None:
    """Refuse a source that the bundle was not exported from: its ranges would be those of other weights."""
    from edgediffusion.export.families import family_of
    from edgediffusion.export.lora import refuse_fused
    from edgediffusion.files import sha256

    refuse_fused(bundle)
    networks = {part.network for part in family_of(source)[1].parts(source)}
    digest = source.digest({file: sha256(file) for name in networks for file in source.checkpoint(name).files})
    stated = next((verb.arguments.get("source") for verb in bundle.history if verb.name == "export"), None)
    if digest != stated:
        raise ArgumentError(
            f"'{source.path}' is not what the bundle '{bundle.path}' was exported from",
            do=f"Give the folder it was exported from, or export again: edgediffusion export {source.path} -o BUNDLE",
        )


def read_prompts(folder: Path) -> list[str]:
    """The lines of ``prompts.txt`` in a source or a bundle that are not empty.

    Raises:
        ArgumentError: there is no such file, nothing in it, or it is no text.
    """
    file = folder / PROMPTS
    if not file.is_file():
        raise ArgumentError(
            "Calibration draws pictures and has no prompts for them",
            got=f"no {PROMPTS} in '{folder}'",
            do="Give a file with one prompt on each line: --prompts FILE",
        )
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ArgumentError(f"'{file}' is not text in UTF-8: {error}", do="Save it as UTF-8, or give another: --prompts FILE") from None
