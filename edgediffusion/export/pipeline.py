"""A whole pipeline's folder becomes the folder of a bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir
import torch

from edgediffusion import bundle
from edgediffusion.bundle import Component, File, TensorSpec, Verb
from edgediffusion.export import Progress, tokenizers
from edgediffusion.export.checkpoint import Stored
from edgediffusion.export.families import FLOAT, Family, Part, Tensor, family_of
from edgediffusion.export.group_norm import lower_group_norm
from edgediffusion.export.naming import match
from edgediffusion.export.simplify import simplify
from edgediffusion.export.skeleton import Skeleton, skeleton
from edgediffusion.export.source import INDEX, Source
from edgediffusion.export.trace import trace
from edgediffusion.export.weights import attach
from edgediffusion.files import sha256

MODEL = "model.onnx"
PROMPTS = "prompts.txt"  # those that a source recommends for calibration
_ORIGINS = ("_name_or_path", "name_or_path")
_TOOLS = ("torch", "diffusers", "transformers", "onnx-ir", "onnxscript")


def write_bundle(source: Source, folder: Path, *, dtype: str, opset: int, link: bool, progress: Progress | None) -> None:
    """Fill the empty ``folder``. Everything that can be refused is refused before the first graph is traced.

    Raises:
        SourceError: the source is no pipeline that can be exported.
    """
    name, family = family_of(source)
    parts = family.parts(source)
    sampling = family.sampling(source)
    checkpoints = {part.network: source.checkpoint(part.network) for part in parts}
    components = tuple(_copy_texts(source, part, folder, dtype) for part in parts)
    bones = {part: skeleton(partial(source.network, part.network), getattr(torch, dtype)) for part in parts}
    stored = {p: match(checkpoints[p.network], b.shapes, tied=b.tied, prefix=b.prefix) for p, b in bones.items()}
    placed: dict[Path, Path] = {}
    for done, part in enumerate(parts):
        if progress is not None:
            progress(f"exporting {part.name}", done / len(parts))
        model = _graph(part, bones.pop(part), getattr(torch, dtype), opset)
        _write_graph(source, part, model, stored[part], folder / part.name, link=link, placed=placed)
    if progress is not None:
        progress("hashing", 1.0)
    _copy_index(source, folder, family)
    if (source.path / PROMPTS).is_file():
        _copy_file(source.path / PROMPTS, folder / PROMPTS)
    digests = {file: sha256(file) for checkpoint in checkpoints.values() for file in checkpoint.files}
    arguments = {"pipeline": source.class_name, "source": source.digest(digests), "dtype": dtype, "opset": opset}
    history = (Verb("export", arguments, {tool: version(tool) for tool in _TOOLS}),)
    bundle.write(folder, family=name, components=components, sampling=sampling, history=history, known=_known(folder, placed, digests))


def _graph(part: Part, bones: Skeleton, dtype: torch.dtype, opset: int) -> ir.Model:
    """The part's graph as it will be, but for the values of its weights."""
    traced = trace(part, bones, dtype, opset)
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
