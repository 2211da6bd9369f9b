"""Calibrate: draw with the float bundle, keep what the denoiser was fed, and find the ranges of its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from edgediffusion.bundle import Bundle, Component
from edgediffusion.errors import ArgumentError, OutputError
from edgediffusion.optimize import parts
from edgediffusion.optimize.items import Drawing, Drawn, Tell, check_drawing, draw_items
from edgediffusion.optimize.recipe import Recipe, load_recipe
from edgediffusion.optimize.state import LayerState, QuantizationState, weights_digest

Progress = Callable[[str, float], None]
PROMPTS = "prompts.txt"


def calibrate(
    bundle: Bundle,
    *,
    source: str | Path,
    output: str | Path,
    strategy: str = "uniform",
    samples: int = 128,
    steps: int | None = None,
    seed: int = 0,
    prompts: Sequence[str] | None = None,
    guidance_scale: float | None = None,
    sampler: str | None = None,
    recipe: str | Recipe = "int8",
    options: Mapping[str, object] | None = None,
    tell: Tell = lambda line: None,
    progress: Progress = lambda label, part: None,
) -> QuantizationState:
    """Find the ranges of the denoiser's layers and write them to ``output``.

    ``samples`` items are drawn with the sampler, steps and guidance of the deployment (by default the bundle's own),
    at the steps that ``strategy`` chooses, a name with ``options``. ``prompts`` are by default the lines of
    ``prompts.txt`` in the source. A run that was stopped keeps its finished batches beside ``output``; the same call goes
    on from them and ends in the same bytes. ``recipe`` is a name, the path of a TOML file, or a Recipe: number formats, and the
    methods that find their parameters. ``tell`` gets sentences for a person, such as that it did.

    Raises:
        UnknownName: no such strategy, sampler or recipe. ArgumentError: samples, steps, prompts or options that cannot be used, or
        the bundle is of another source. Cancelled: Ctrl-C, where finished batches are kept.
        OutputError: ``output`` exists. MissingExtra: the extra ``optimize`` is not installed.
    """
    chosen = load_recipe(recipe)
    if Path(output).exists():
        raise OutputError(f"The output '{output}' exists already", do="Choose another name, or remove it first.")
    from edgediffusion.export.source import Source

    origin = Source.open(Path(source))
    _denoisers(bundle)
    texts = list(prompts) if prompts is not None else read_prompts(Path(source))
    drawing = Drawing(strategy, samples, steps, seed, guidance_scale, sampler, options or {})
    check_drawing(drawing, texts)  # before all weights are read for their hashes
    _same_source(bundle, origin)
    with parts.beside(Path(output)) as keep:
        drawn = draw_items(bundle, texts, drawing, keep=keep, tell=tell, progress=progress)
        state = state_of(bundle, origin, drawn, chosen, progress=progress)
        state.save(Path(output))
    return state


def state_of(
    bundle: Bundle, source: object, drawn: Drawn, recipe: Recipe, *, progress: Progress = lambda label, part: None
) -> QuantizationState:
    """The state of the bundle's denoiser for a recipe, from items that are drawn already.

    ``source`` is the opened ``export.source.Source`` that the bundle was exported from.
    """
    (component,) = _denoisers(bundle)
    layers = _measure(source, component, drawn, recipe, progress)
    return QuantizationState(
        weights=weights_digest(bundle, component),
        calibration=drawn.record,
        layers={f"{component.name}/{name}": layer for name, layer in layers.items()},
        recipe=recipe.to_json(),
        versions={tool: version(tool) for tool in ("torch", "diffusers")},
    )


def _measure(source: object, component: Component, drawn: Drawn, recipe: Recipe, progress: Progress) -> dict[str, LayerState]:
    from edgediffusion.export.families import family_of
    from edgediffusion.export.source import Source
    from edgediffusion.optimize.measure import measure

    assert isinstance(source, Source)
    part = next(p for p in family_of(source)[1].parts(source) if p.name == component.name)
    network = source.load(part.network)
    module = part.wrap(network)
    prefix = next(f"{name}." for name, child in module.named_children() if child is network)
    items = [(item.step, item.feeds) for item in drawn.items]
    guidance, seed = float(drawn.record["guidance_scale"]), int(drawn.record["seed"])
    return measure(module, items, recipe, prefix=prefix, seed=seed, guidance_scale=guidance, progress=progress)


def _denoisers(bundle: Bundle) -> tuple[Component, ...]:
    if any(verb.name == "quantize" for verb in bundle.history):
        raise ArgumentError(f"The bundle '{bundle.path}' is quantized already", do="Calibrate the float bundle it was made from.")
    found = bundle.with_role("denoise")
    if len(found) != 1:
        raise ArgumentError("Calibration needs a bundle with one denoiser", got=f"{len(found)} of them")
    return found


def _same_source(bundle: Bundle, source: object) -> None:
    """Refuse a source that the bundle was not exported from: its ranges would be those of other weights."""
    from edgediffusion.export.families import family_of
    from edgediffusion.export.source import Source
    from edgediffusion.files import sha256

    assert isinstance(source, Source)
    networks = {part.network for part in family_of(source)[1].parts(source)}
    digest = source.digest({file: sha256(file) for name in networks for file in source.checkpoint(name).files})
    stated = next((verb.arguments.get("source") for verb in bundle.history if verb.name == "export"), None)
    if digest != stated:
        raise ArgumentError(
            f"'{source.path}' is not what the bundle '{bundle.path}' was exported from",
            do=f"Give the folder it was exported from, or export again: edgediffusion export {source.path} -o BUNDLE",
        )


def read_prompts(source: Path) -> list[str]:
    """The lines of ``prompts.txt`` in the source that are not empty.

    Raises:
        ArgumentError: there is no such file, nothing in it, or it is no text.
    """
    file = source / PROMPTS
    if not file.is_file():
        raise ArgumentError(
            "Calibration draws pictures and has no prompts for them",
            got=f"no {PROMPTS} in '{source}'",
            do="Give a file with one prompt on each line: --prompts FILE",
        )
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ArgumentError(f"'{file}' is not text in UTF-8: {error}", do="Save it as UTF-8, or give another: --prompts FILE") from None
