"""Lower: a bundle's graphs said in an older ONNX operator set, for engines that read no newer one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from edgediffusion import __version__, targets
from edgediffusion.bundle import Bundle, Component, Verb, write
from edgediffusion.errors import ArgumentError
from edgediffusion.files import link_or_copy, new_folder
from edgediffusion.registry import require

if TYPE_CHECKING:
    from collections.abc import Mapping

Progress = Callable[[str, float], None]
OPSETS = range(17, 24)
_SHOWN = 3  # reasons in a message


@dataclass(frozen=True)
class LoweredGraph:
    """What lowering did to one graph; ``rewritten`` counts the nodes that were decomposed or changed, by operator."""

    opset_before: int
    opset: int
    nodes_before: int
    nodes: int
    rewritten: Mapping[str, int]


def lower(
    bundle: Bundle,
    output: str | Path,
    *,
    target: str | None = None,
    opset: int | None = None,
    progress: Progress = lambda label, part: None,
) -> Bundle:
    """Write the bundle with every graph in operator set ``opset``, or in the newest that the engines of ``target`` read.

    The graphs compute the same to rounding. Weights are linked; graphs that are old enough stay as they are; engines, which were built
    from the graphs, are left out. What happened to each graph is in the new bundle's history, as the fields of ``LoweredGraph``.

    Raises:
        ArgumentError: both or none of ``target`` and ``opset`` are given, no such opset, or a graph has what the older set has no words
        for: codes of four bits in blocks, fp8; the message names the graph and why.
        UnknownName: no such target. OutputError: ``output`` exists or cannot be written.
        MissingExtra: a library of the extra ``export`` is not installed.
    """
    wanted = _opset(target, opset)
    for module in ("onnx", "onnx_ir"):
        require(module, extra="export", purpose="Lowering a bundle")
    with new_folder(Path(output)) as folder:
        models = {component.model for component in bundle.components}
        kept = [name for name in bundle.files if name not in models and not name.startswith("engines/")]
        for name in kept:
            link_or_copy(bundle.path / name, folder / name)
        reports = {}
        for at, component in enumerate(bundle.components):
            progress(f"lowering {component.name}", at / len(bundle.components))
            reports[component.name] = asdict(_lower_component(bundle, component, folder, wanted))
        progress("writing", 1.0)
        arguments = {"opset": wanted, **({} if target is None else {"target": targets.load(target).name}), "graphs": reports}
        versions = {"edgediffusion": __version__, "onnx": version("onnx"), "onnx-ir": version("onnx-ir")}
        write(
            folder,
            family=bundle.family,
            components=bundle.components,
            sampling=bundle.sampling,
            history=(*bundle.history, Verb("lower", arguments, versions)),
            known={name: bundle.files[name] for name in kept},
        )
    return Bundle.open(output, verify=False)


def _opset(target: str | None, opset: int | None) -> int:
    if (target is None) == (opset is None):
        raise ArgumentError("Lowering is for a target or for an opset", got="both" if target else "neither", do="Give --target or --opset.")
    wanted = opset if target is None else min(targets.load(target).opset, OPSETS[-1])
    if wanted is None or wanted not in OPSETS:
        raise ArgumentError("Graphs cannot be lowered to this opset", got=wanted, allowed=f"{OPSETS[0]} to {OPSETS[-1]}")
    return wanted


def _lower_component(bundle: Bundle, component: Component, folder: Path, opset: int) -> LoweredGraph:
    import onnx_ir as ir

    from edgediffusion.export.lower_graph import lower_model

    file, target = bundle.path / component.model, folder / component.model
    model = ir.load(file)
    before = len(model.graph)
    done = lower_model(model, opset)
    if done.refused:
        more = f" and {len(done.refused) - _SHOWN} more" if len(done.refused) > _SHOWN else ""
        raise ArgumentError(
            f"The graph '{component.name}' has what opset {opset} has no words for",
            got="; ".join(done.refused[:_SHOWN]) + more,
            do="Quantize the float bundle for the target by another recipe, as int8, or lower it to a newer opset.",
        )
    if done.opset == done.opset_before:
        link_or_copy(file, target)
    else:
        target.parent.mkdir(exist_ok=True)
        ir.save(model, target)  # weights stay where they are: their files are linked
    return LoweredGraph(done.opset_before, done.opset, before, len(model.graph), done.rewritten)
