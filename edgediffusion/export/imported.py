"""ONNX files that somebody else exported, as a bundle: their names and axes mapped to the roles', their weights left in their files.

A file is read, renamed, freed of what tells about the machine that made it, and run once. Nothing is traced: no torch is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from edgediffusion import bundle
from edgediffusion.bundle import Component, Sampling, TensorSpec, Verb, axis_size
from edgediffusion.errors import ArgumentError, SourceError
from edgediffusion.export import Progress
from edgediffusion.export.cut_graphs import specs
from edgediffusion.export.probe import check_role, run_once
from edgediffusion.export.store import CODES, planned, write_tensors
from edgediffusion.files import link_or_copy
from edgediffusion.registry import require

FAMILY, MODEL, WEIGHTS = "onnx", "model.onnx", "weights.safetensors"
OLDEST_OPSET, NEWEST_OPSET = 11, 25
_IR_VERSION = 11  # the newest that has something for these opsets; the onnx package writes newer ones, which engines do not read yet
_DOMAINS = ("", "ai.onnx", "com.microsoft")
_LARGE_BYTES = 1 << 16  # of weights that leave the graph's own file
_TRIED_SIZE = 8  # of a free axis that nothing is known about


@dataclass(frozen=True)
class Imported:
    """One file. ``names`` maps its tensors' names to the role's, ``axes`` the names of its free axes to the bundle's, or an axis
    by ``tensor:place`` where the file has no name for it. ``sizes`` are those to run it with once, by the bundle's names."""

    file: Path
    role: str
    name: str
    names: Mapping[str, str] = field(default_factory=dict)
    axes: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)


def sampling_for(model: Imported, scheduler: Path, *, steps: int) -> Sampling:
    """The facts for a denoiser from its file and a ``scheduler_config.json``.

    Raises:
        SourceError: one of them cannot be read, or the scheduler does something that no sampler here does.
    """
    require("diffusers", extra="export", purpose="Reading a scheduler")
    from edgediffusion.export.bare_sampling import sampling_of

    graph = _read(model.file).graph
    _rename(graph, model)
    shapes = {str(value.name): value.shape for value in graph.inputs}
    sample = [size if isinstance(size, int) else model.sizes.get(str(size.value), _TRIED_SIZE) for size in shapes.get("sample") or ()]
    return sampling_of(scheduler, sample, steps=steps)


def write_imported(models: Sequence[Imported], folder: Path, *, sampling: Sampling | None, link: bool, progress: Progress | None) -> None:
    """Fill the empty ``folder``.

    Raises:
        SourceError: a file is missing, damaged, or uses what engines do not know. ArgumentError: it does not fit its role.
    """
    components = []
    for done, model in enumerate(models):
        if progress is not None:
            progress(f"importing {model.name}", done / len(models))
        components.append(_write(model, folder, sampling, link=link))
    _check_together(components, sampling)
    arguments = {"models": [{"name": m.name, "role": m.role, "file": m.file.name} for m in models]}
    history = (Verb("import-onnx", arguments, {"onnx-ir": version("onnx-ir")}),)
    bundle.write(folder, family=FAMILY, components=tuple(components), sampling=sampling, history=history)


def _write(model: Imported, folder: Path, sampling: Sampling | None, *, link: bool) -> Component:
    graph = _read(model.file)
    _check_operators(graph, model.file)
    _rename(graph.graph, model)
    _strip(graph)
    graph.ir_version = min(graph.ir_version, _IR_VERSION)
    file = folder / model.name / MODEL
    file.parent.mkdir(parents=True)
    _place_weights(graph, model.file, file.parent, link=link)
    ir.save(graph, file)
    component = Component(model.name, model.role, f"{model.name}/{MODEL}", specs(graph.graph.inputs), specs(graph.graph.outputs))
    check_role(component)
    run_once(component, file, _feeds(component, model, sampling))
    return component


def _read(file: Path) -> ir.Model:
    if not file.is_file():
        raise SourceError(f"There is no file '{file}'", do="Give an .onnx file.")
    try:
        model = ir.load(file)
    except Exception as error:  # protobuf's errors have no base in common with those of onnx-ir
        raise SourceError(f"'{file.name}' cannot be read as an ONNX file: {str(error).splitlines()[0]}", do="Export it again.") from error
    if not len(model.graph) or not model.graph.inputs:
        raise SourceError(f"'{file.name}' has no graph that takes and computes something", do="Give an .onnx file of a network.")
    return model


def _check_operators(model: ir.Model, file: Path) -> None:
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise SourceError(
            f"'{file.name}' has an opset that engines here do not read",
            got=opset,
            allowed=f"{OLDEST_OPSET} to {NEWEST_OPSET}",
            do="Convert it: onnx.version_converter.convert_version.",
        )
    own = {(function.domain, function.name) for function in model.functions.values()}
    odd = sorted(
        {f"{n.domain}.{n.op_type}" for n in model.graph.all_nodes() if n.domain not in _DOMAINS and (n.domain, n.op_type) not in own}
    )
    if odd:
        raise SourceError(
            f"'{file.name}' has operators that engines here do not know",
            got=", ".join(odd),
            allowed="those of ONNX and of ONNX Runtime",
            do="Export the network without custom operators.",
        )


def _rename(graph: ir.Graph, model: Imported) -> None:
    values = {str(value.name): value for value in (*graph.inputs, *graph.outputs)}
    if unknown := sorted(set(model.names) - set(values)):
        raise ArgumentError(
            f"'{model.file.name}' has no input or output '{unknown[0]}'", allowed=", ".join(values), do="Rename one of these."
        )
    used: set[str] = set()
    for name, value in values.items():
        if value.shape is None or value.dtype is None:
            raise SourceError(f"The file does not state type and shape of '{name}'", do="Run onnx.shape_inference on it.")
        value.shape = ir.Shape([_axis(name, place, size, model.axes, used) for place, size in enumerate(value.shape)])
    if unknown := sorted(set(model.axes) - used):
        known = sorted(
            {
                str(s.value) if s.value else f"{n}:{p}"
                for n, v in values.items()
                for p, s in enumerate(v.shape or ())
                if not isinstance(s, int)
            }
        )
        raise ArgumentError(f"'{model.file.name}' has no free axis '{unknown[0]}'", allowed=", ".join(known) or "none")
    taken = {str(value.name) for node in graph.all_nodes() for value in node.outputs} | set(graph.initializers)
    for name, new in model.names.items():
        if new != name and new in taken | set(values) and new not in model.names:
            _move_away(graph, new)
        values[name].name = new


def _axis(tensor: str, place: int, size: int | ir.SymbolicDim, axes: Mapping[str, str], used: set[str]) -> int | str:
    if isinstance(size, int):
        return size
    for key in (f"{tensor}:{place}", str(size.value)):
        if key in axes:
            used.add(key)
            return axes[key]
    return str(size.value) if size.value else f"{tensor}_{place}"


def _move_away(graph: ir.Graph, name: str) -> None:
    """A value inside the graph that has the name which an input or output shall get."""
    for node in graph.all_nodes():
        for value in node.outputs:
            if value.name == name:
                value.name = f"{name}.inside"
    if name in graph.initializers:
        value = graph.initializers.pop(name)
        value.name = f"{name}.inside"
        graph.initializers[value.name] = value


def _strip(model: ir.Model) -> None:
    """Exporters note source lines, stack traces and their users' paths."""
    common.ClearMetadataAndDocStringPass()(model)
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *(v for node in model.graph.all_nodes() for v in node.outputs)):
        value.metadata_props.clear()
        value.doc_string = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    model.graph.name = "main"
    model.domain = model.producer_name = model.producer_version = None


def _place_weights(model: ir.Model, source: Path, folder: Path, *, link: bool) -> None:
    """External weights stay in their files, linked or copied; large ones inside the graph's file go to one of their own."""
    inside: dict[str, ir.TensorProtocol] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            location = Path(str(tensor.location))
            file = source.parent / location
            if location.is_absolute() or not file.resolve().is_relative_to(source.parent.resolve()):
                raise SourceError(f"'{source.name}' has weights outside its folder", got=str(location), do="Do not use it.")
            if not file.is_file():
                raise SourceError(f"The weights '{location}' of '{source.name}' are missing", do="Copy them beside it.")
            if not (folder / location.name).exists():
                link_or_copy(file, folder / location.name, link=link)
            elif not (folder / location.name).samefile(file) and link:
                raise SourceError(f"Two files with weights of '{source.name}' have one name", got=location.name, do="Rename one.")
            value.const_value = ir.ExternalTensor(
                location.name, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=name, base_dir=str(folder)
            )
        elif tensor is not None and tensor.nbytes > _LARGE_BYTES and tensor.dtype in CODES:
            inside[name] = tensor
    found = {name: planned(t) for name, t in inside.items()}
    for name, at in write_tensors(folder / WEIGHTS, found).items() if found else ():
        model.graph.initializers[name].const_value = ir.ExternalTensor(
            WEIGHTS, at.offset, at.bytes, inside[name].dtype, shape=ir.Shape(at.shape), name=name, base_dir=str(folder)
        )


def _feeds(component: Component, model: Imported, sampling: Sampling | None) -> dict[str, np.ndarray]:
    """Random numbers of about unit size, the middle of the schedule, and zeros for whole numbers."""
    sizes = {"batch": 2, **({} if sampling is None else {"height": sampling.height, "width": sampling.width}), **model.sizes}
    generator = np.random.default_rng(0)
    feeds = {}
    for spec in component.inputs:
        shape = [n if isinstance(n, int) else axis_size(n, sizes) or _TRIED_SIZE for n in spec.shape]
        feeds[spec.name] = _example(spec, shape, generator, 500.0 if sampling is None else sampling.schedule.train_steps / 2)
    return feeds


def _example(spec: TensorSpec, shape: Sequence[int], generator: np.random.Generator, moment: float) -> np.ndarray:
    if spec.name == "timestep":
        return np.full(shape, moment).astype(spec.dtype)
    values = generator.standard_normal(shape) if np.dtype(spec.dtype).kind == "f" else np.zeros(shape)
    return np.asarray(values.astype(spec.dtype))


def _check_together(components: Sequence[Component], sampling: Sampling | None) -> None:
    roles = [component.role for component in components]
    if len({component.name for component in components}) < len(components):
        raise ArgumentError("Two components have one name", got=", ".join(component.name for component in components))
    if any(roles.count(role) > 1 for role in ("denoise", "decode", "encode_image")):
        raise ArgumentError("A pipeline has one graph of a role", got=", ".join(roles))
    if "denoise" in roles and sampling is None:
        raise ArgumentError("A denoiser needs the facts about sampling", do="Give its scheduler: sampling=, or --scheduler FILE.")
