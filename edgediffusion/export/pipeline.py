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
from onnx_ir.tensor_adapters import from_torch_dtype

from edgediffusion import bundle
from edgediffusion.bundle import CONTROL, Component, File, TensorSpec, Verb
from edgediffusion.errors import ArgumentError
from edgediffusion.export import Announce, Progress, Settings, tokenizers
from edgediffusion.export.bfloat16 import NARROW, speak_float32, spoken
from edgediffusion.export.checkpoint import Stored
from edgediffusion.export.control import shallow_parts
from edgediffusion.export.cut_graphs import write_part
from edgediffusion.export.estimate import Work, estimate, refuse_full_disk
from edgediffusion.export.families import BATCH, FLOAT, Family, Part, Tensor, family_of
from edgediffusion.export.group_norm import lower_group_norm
from edgediffusion.export.hashing import hashing
from edgediffusion.export.kept import WHOLE, Kept, keep, kept_by_diffusers, read_kept
from edgediffusion.export.lora import Lora, fused, identity
from edgediffusion.export.naming import match
from edgediffusion.export.sample_sizes import read_off_sample
from edgediffusion.export.simplify import simplify
from edgediffusion.export.skeleton import Skeleton, skeleton
from edgediffusion.export.source import INDEX, Source
from edgediffusion.export.trace import NO_MARKS, trace
from edgediffusion.export.weights import Changes, attach, converted_bytes

MODEL = "model.onnx"
TIMESTEP = "timestep"
PROMPTS = "prompts.txt"  # those that a source recommends for calibration
_SHOWN = 12  # cuts in a message
_ORIGINS = ("_name_or_path", "name_or_path")
_TOOLS = ("torch", "diffusers", "transformers", "onnx-ir", "onnxscript")


def write_bundle(
    source: Source,
    folder: Path,
    settings: Settings,
    *,
    progress: Progress | None,
    announce: Announce | None,
) -> None:
    """Fill the empty ``folder``. Everything that can be refused is refused before the first graph is traced.

    Raises:
        SourceError: the source is no pipeline that can be exported, or a LoRA does not fit it. OutputError: the disk has no room for it.
        ArgumentError: it cannot be cut so, or has no module to be kept in float32.
    """
    name, family = family_of(source)
    parts = family.parts(source)
    sampling = family.sampling(source)
    checkpoints = {part.network: source.checkpoint(part.network) for part in parts}
    loras = [Lora.open(Path(file), scale) for file, scale in settings.loras]
    kept = _kept(source, parts, settings)
    described = {part: _copy_texts(source, part, folder, _part_dtype(part, kept, settings)) for part in parts}
    bones = {part: _skeleton(source, part, kept, settings) for part in parts}
    stored = {p: match(checkpoints[p.network], b.shapes, tied=b.tied, prefix=b.prefix) for p, b in bones.items()}
    changes = _changes(parts, bones, loras)
    chosen = _choose_cuts(source, bones, settings.cuts)
    files = sorted({file for checkpoint in checkpoints.values() for file in checkpoint.files})
    estimated = estimate([_work(b, stored[p], changes.get(p.network, {})) for p, b in bones.items()], files, folder, link=settings.link)
    if announce is not None:
        announce(estimated)
    refuse_full_disk(estimated, folder)
    placed: dict[Path, Path] = {}
    components: list[Component] = []
    with hashing([*files, *(lora.file for lora in loras)]) as digests:
        for done, part in enumerate(parts):
            _tell(progress, f"exporting {part.name}", done / len(parts))
            model, whole, cut_out = _part(part, bones.pop(part), described[part], chosen.get(part, ()), settings)
            if part.role == CONTROL:
                cut_out = shallow_parts(whole, components)
            _copy_file(source.path / part.network / "config.json", folder / part.name / "config.json")
            values = {weight: stored[part][weight] for weight in model.graph.initializers if weight in stored[part]}
            of_part = {weight: change for weight, change in changes.get(part.network, {}).items() if weight in values}
            attach(model, values, folder / part.name, link=settings.link, placed=placed, changes=of_part)
            ir.save(model, folder / part.name / MODEL)
            components += [whole, *(write_part(model, folder / part.name, component, folder) for component in cut_out)]
        _tell(progress, "hashing", 1.0)
        hashes = digests()
    _copy_index(source, folder, family)
    if (source.path / PROMPTS).is_file():
        _copy_file(source.path / PROMPTS, folder / PROMPTS)
    arguments = {
        "pipeline": source.class_name,
        "source": identity(source.digest({file: hashes[file] for file in files}), [(hashes[lora.file], lora.scale) for lora in loras]),
        **_facts(settings, chosen, kept, loras, hashes),
    }
    history = (Verb("export", arguments, {tool: version(tool) for tool in _TOOLS}),)
    known = _known(folder, placed, hashes)
    bundle.write(folder, family=name, components=tuple(components), sampling=sampling, history=history, known=known)


def _facts(
    settings: Settings, chosen: Mapping[Part, Sequence[str]], kept: Kept, loras: Sequence[Lora], hashes: Mapping[Path, str]
) -> dict[str, object]:
    """What the history says of the settings. Files by their names alone: where they lie is nobody's business."""
    facts: dict[str, object] = {"dtype": settings.dtype, "opset": settings.opset}
    if chosen:
        facts["cuts"] = [cut for of_part in chosen.values() for cut in of_part]
    if settings.row_timesteps:
        facts["row_timesteps"] = True
    if kept:
        facts["keep_float32"] = [f"{component}.{path}".rstrip(".") for component, paths in kept.items() for path in paths]
    if loras:
        facts["loras"] = [{"file": lora.file.name, "sha256": hashes[lora.file], "scale": lora.scale} for lora in loras]
    return facts


def _kept(source: Source, parts: Sequence[Part], settings: Settings) -> Kept:
    by_class = kept_by_diffusers(source) if settings.dtype == "float16" else ()
    names = () if settings.dtype == "float32" else dict.fromkeys((*settings.keep_float32, *by_class))
    return read_kept(tuple(names), (part.network for part in parts))


def _part_dtype(part: Part, kept: Kept, settings: Settings) -> str:
    return "float32" if WHOLE in kept.get(part.network, ()) else settings.dtype


def _skeleton(source: Source, part: Part, kept: Kept, settings: Settings) -> Skeleton:
    dtype = getattr(torch, _part_dtype(part, kept, settings))
    paths = () if dtype is torch.float32 else kept.get(part.network, ())
    bones = skeleton(partial(source.network, part.network), dtype, paths)
    keep(bones.network, part.network, paths, dtype)
    return bones


def _changes(parts: Sequence[Part], bones: Mapping[Part, Skeleton], loras: Sequence[Lora]) -> Mapping[str, Changes]:
    denoiser = next((part.network for part in parts if part.role == "denoise"), "")
    return fused(loras, {part.network: bones[part].shapes for part in parts}, denoiser) if loras else {}


def _work(bones: Skeleton, stored: Mapping[str, Stored], changes: Changes) -> Work:
    """What a part's graph costs. A weight is written anew where ``attach`` will do so."""
    wanted = {name: tensor.dtype for name, tensor in bones.network.state_dict().items() if name in stored}
    return Work(len(stored), converted_bytes(stored, {n: from_torch_dtype(dtype) for n, dtype in wanted.items()}, changes))


def _part(
    part: Part, bones: Skeleton, component: Component, cuts: Sequence[str], settings: Settings
) -> tuple[ir.Model, Component, tuple[Component, ...]]:
    """A part's graph, without its weights' values; its component, and those that are to be cut out of it."""
    model = _graph(part, bones, settings.opset, cuts)
    if settings.row_timesteps and part.role in ("denoise", CONTROL):
        component = _with_row_timesteps(model.graph, component)
    cut_out: tuple[Component, ...] = ()
    if part.cuts is not None and cuts:
        component, cut_out = part.cuts.settle(model.graph, component, cuts)
    speak_float32(model.graph)  # last: what is at the cuts is found by the nodes that read it
    return model, spoken(component), tuple(map(spoken, cut_out))


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


def _graph(part: Part, bones: Skeleton, opset: int, cuts: Sequence[str]) -> ir.Model:
    """The part's graph as it will be, but for the values of its weights; what is marked for its cuts are its last outputs."""
    marks = part.cuts.marks(bones.network, cuts) if part.cuts is not None and cuts else NO_MARKS
    traced = trace(part, bones, bones.dtype, opset, marks)
    model = traced.model
    constants = {**traced.constants, **bones.constants}
    for name, own in traced.names.items():
        value = model.graph.initializers.pop(name)
        value.name = own
        model.graph.initializers[own] = value
        # The tracer's value is a fake tensor. That of a weight is settled last: the optimizer must not look at it.
        value.const_value = _constant(constants[own], own) if own in constants else None
    simplify(model)
    read_off_sample(model)
    lower_group_norm(model)
    return model


def _constant(values: torch.Tensor, name: str) -> ir.TensorProtocol:
    if values.dtype == torch.bfloat16:  # NumPy has none of its own
        return ir.tensor(values.float().numpy().astype(NARROW.numpy()), name=name)
    return ir.tensor(values.numpy(), name=name)


def _with_row_timesteps(graph: ir.Graph, component: Component) -> Component:
    """Let the time step have a value for each row. It was traced with one for all, which the graph expands to the rows."""
    value = next(value for value in graph.inputs if value.name == TIMESTEP)
    value.shape = ir.Shape([BATCH.name])
    spec = next(spec for spec in component.inputs if spec.name == TIMESTEP)
    return replace(component, inputs=tuple(replace(s, shape=(BATCH.name,)) if s is spec else s for s in component.inputs))


def _copy_texts(source: Source, part: Part, folder: Path, dtype: str) -> Component:
    """Copy what a part needs beside its graph, and describe the part."""
    (folder / part.name).mkdir()
    tokenizer = None
    if part.tokenizer is not None:
        _copy_folder(source, part.tokenizer, folder)
        tokenizer = tokenizers.write_tokenizer(source, part, folder)
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


def _tell(progress: Progress | None, what: str, part: float) -> None:
    if progress is not None:
        progress(what, part)


def _known(folder: Path, placed: dict[Path, Path], digests: Mapping[Path, str]) -> dict[str, File]:
    """The hashes of weight files, which were taken from the source's files and not read again."""
    known = {}
    for file in placed:
        for here in folder.glob(f"*/{file.name}"):
            if here.samefile(placed[file]):
                known[here.relative_to(folder).as_posix()] = File(digests[file], file.stat().st_size)
    return known
