"""A whole pipeline's folder becomes the folder of a bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir
import torch

from edgediffusion import bundle
from edgediffusion.bundle import Component, File, TensorSpec, Verb
from edgediffusion.errors import ArgumentError
from edgediffusion.export import Progress, tokenizers
from edgediffusion.export.checkpoint import Stored
from edgediffusion.export.cut_graphs import write_part
from edgediffusion.export.families import BATCH, FLOAT, Family, Part, Tensor, family_of
from edgediffusion.export.group_norm import lower_group_norm
from edgediffusion.export.naming import match
from edgediffusion.export.simplify import simplify
from edgediffusion.export.skeleton import Skeleton, skeleton
from edgediffusion.export.source import INDEX, Source
from edgediffusion.export.trace import NO_MARKS, trace
from edgediffusion.export.weights import attach
from edgediffusion.files import sha256

MODEL = "model.onnx"
TIMESTEP = "timestep"
PROMPTS = "prompts.txt"  # those that a source recommends for calibration
_SHOWN = 12  # cuts in a message
_ORIGINS = ("_name_or_path", "name_or_path")
_TOOLS = ("torch", "diffusers", "transformers", "onnx-ir", "onnxscript")


def write_bundle(
    source: Source,
    folder: Path,
    *,
    dtype: str,
    opset: int,
    link: bool,
    cuts: Sequence[str],
    row_timesteps: bool,
    progress: Progress | None,
) -> None:
    """Fill the empty ``folder``. Everything that can be refused is refused before the first graph is traced.

    Raises:
        SourceError: the source is no pipeline that can be exported. ArgumentError: it cannot be cut so.
    """
    name, family = family_of(source)
    parts = family.parts(source)
    sampling = family.sampling(source)
    checkpoints = {part.network: source.checkpoint(part.network) for part in parts}
    described = {part: _copy_texts(source, part, folder, dtype) for part in parts}
    bones = {part: skeleton(partial(source.network, part.network), getattr(torch, dtype)) for part in parts}
    stored = {p: match(checkpoints[p.network], b.shapes, tied=b.tied, prefix=b.prefix) for p, b in bones.items()}
    chosen = _choose_cuts(source, bones, cuts)
    placed: dict[Path, Path] = {}
    components: list[Component] = []
    for done, part in enumerate(parts):
        if progress is not None:
            progress(f"exporting {part.name}", done / len(parts))
        of_part = chosen.get(part, ())
        model, whole = _graph(part, bones.pop(part), getattr(torch, dtype), opset, of_part), described[part]
        if row_timesteps and part.role == "denoise":
            whole = _with_row_timesteps(model.graph, whole)
        whole, cut_out = (whole, ()) if part.cuts is None or not of_part else part.cuts.settle(model.graph, whole, of_part)
        _write_graph(source, part, model, stored[part], folder / part.name, link=link, placed=placed)
        components += [whole, *(write_part(model, folder / part.name, component, folder) for component in cut_out)]
    if progress is not None:
        progress("hashing", 1.0)
    _copy_index(source, folder, family)
    if (source.path / PROMPTS).is_file():
        _copy_file(source.path / PROMPTS, folder / PROMPTS)
    digests = {file: sha256(file) for checkpoint in checkpoints.values() for file in checkpoint.files}
    arguments: dict[str, object] = {"pipeline": source.class_name, "source": source.digest(digests), "dtype": dtype, "opset": opset}
    if chosen:
        arguments["cuts"] = [cut for of_part in chosen.values() for cut in of_part]
    if row_timesteps:
        arguments["row_timesteps"] = True
    history = (Verb("export", arguments, {tool: version(tool) for tool in _TOOLS}),)
    known = _known(folder, placed, digests)
    bundle.write(folder, family=name, components=tuple(components), sampling=sampling, history=history, known=known)


def _choose_cuts(source: Source, bones: Mapping[Part, Skeleton], cuts: Sequence[str]) -> dict[Part, tuple[str, ...]]:
    """The part to be cut and where, in the network's order; nothing for no cuts."""
    if not cuts:
        return {}
    part = next((part for part in bones if part.cuts is not None), None)
    if part is None or part.cuts is None:
        raise ArgumentError(f"No network of a {source.class_name} can be cut", got=", ".join(cuts), do="Export it without --cut.")
    places = part.cuts.places(bones[part].network)
    unknown = [cut for cut in cuts if cut not in places]
    if unknown:
        raise ArgumentError(
            f"The network '{part.network}' cannot be cut at '{unknown[0]}'",
            allowed=", ".join(places if len(places) <= _SHOWN else (*places[: _SHOWN - 2], "...", places[-1])),
            do="Name one of these.",
        )
    return {part: tuple(place for place in places if place in cuts)}


def _graph(part: Part, bones: Skeleton, dtype: torch.dtype, opset: int, cuts: Sequence[str]) -> ir.Model:
    """The part's graph as it will be, but for the values of its weights; what is marked for its cuts are its last outputs."""
    marks = part.cuts.marks(bones.network, cuts) if part.cuts is not None and cuts else NO_MARKS
    traced = trace(part, bones, dtype, opset, marks)
    model = traced.model
    for name, own in traced.names.items():
        value = model.graph.initializers.pop(name)
        value.name = own
        model.graph.initializers[own] = value
        # The tracer's value is a fake tensor. That of a weight is settled last: the optimizer must not look at it.
        value.const_value = ir.tensor(bones.constants[own].numpy(), name=own) if own in bones.constants else None
    simplify(model)
    lower_group_norm(model)
    return model


def _with_row_timesteps(graph: ir.Graph, component: Component) -> Component:
    """Let the time step have a value for each row. It was traced with one for all, which the graph expands to the rows."""
    value = next(value for value in graph.inputs if value.name == TIMESTEP)
    value.shape = ir.Shape([BATCH.name])
    spec = next(spec for spec in component.inputs if spec.name == TIMESTEP)
    return replace(component, inputs=tuple(replace(s, shape=(BATCH.name,)) if s is spec else s for s in component.inputs))


def _write_graph(
    source: Source, part: Part, model: ir.Model, stored: Mapping[str, Stored], folder: Path, *, link: bool, placed: dict[Path, Path]
) -> None:
    _copy_file(source.path / part.network / "config.json", folder / "config.json")
    attach(model, {name: stored[name] for name in model.graph.initializers if name in stored}, folder, link=link, placed=placed)
    ir.save(model, folder / MODEL)


def _copy_texts(source: Source, part: Part, folder: Path, dtype: str) -> Component:
    """Copy what a part needs beside its graph, and describe the part."""
    (folder / part.name).mkdir()
    tokenizer = None
    if part.tokenizer is not None:
        _copy_folder(source, part.tokenizer, folder)
        length = part.inputs[0].axes[1]
        assert isinstance(length, int)
        tokenizer = tokenizers.write_tokenizer(source, part.tokenizer, folder, length)
    inputs, outputs = (tuple(_spec(tensor, dtype) for tensor in tensors) for tensors in (part.inputs, part.outputs))
    return Component(part.name, part.role, f"{part.name}/{MODEL}", inputs, outputs, tokenizer, dict(part.feeds))


def _spec(tensor: Tensor, dtype: str) -> TensorSpec:
    shape = tuple(axis if isinstance(axis, int) else axis.name for axis in tensor.axes)
    return TensorSpec(tensor.name, dtype if tensor.dtype == FLOAT else tensor.dtype, shape)


def _copy_index(source: Source, folder: Path, family: Family) -> None:
    """The scheduler, and model_index.json without the optional components: no folder of theirs is in the bundle."""
    _copy_folder(source, "scheduler", folder)
    index = {key: value for key, value in source.index.items() if key not in _ORIGINS}
    left_out = [name for name in family.OPTIONAL if name in source.components]
    if not left_out:
        _copy_file(source.path / INDEX, folder / INDEX)
        return
    index |= {name: [None, None] for name in left_out}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_folder(source: Source, name: str, folder: Path) -> None:
    """The files of a small folder of the source; not the hidden ones, which tools leave behind."""
    (folder / name).mkdir()
    for file in sorted((source.path / name).iterdir()):
        if file.is_file() and not file.name.startswith("."):
            _copy_file(file, folder / name / file.name)


def _copy_file(file: Path, target: Path) -> None:
    """As it is, but for the place that a configuration says it was loaded from: a path of somebody's machine, or a name."""
    if file.name == INDEX or file.name.endswith("config.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        kept = {key: value for key, value in content.items() if key not in _ORIGINS}
        if kept != content:
            target.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            return
    shutil.copyfile(file, target)


def _known(folder: Path, placed: dict[Path, Path], digests: dict[Path, str]) -> dict[str, File]:
    """The hashes of weight files, which were taken from the source's files and not read again."""
    known = {}
    for file in placed:
        for here in folder.glob(f"*/{file.name}"):
            if here.samefile(placed[file]):
                known[here.relative_to(folder).as_posix()] = File(digests[file], file.stat().st_size)
    return known
