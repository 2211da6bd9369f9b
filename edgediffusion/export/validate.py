"""How far a bundle is from its source: each graph against its network in torch, and whole pictures against diffusers'."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from edgediffusion.bundle import CONTROL, CUT_ROLES, SHALLOW_CONTROL, Bundle, Component, Sampling, axis_size
from edgediffusion.errors import ArgumentError, BundleError
from edgediffusion.export import Progress
from edgediffusion.export.families import Axis, Part, Tensor, family_of
from edgediffusion.export.lora import refuse_fused
from edgediffusion.export.pictures import Run, asked, takes_prompt
from edgediffusion.export.quiet import quiet
from edgediffusion.export.schedule import scheduler_of
from edgediffusion.export.source import Source
from edgediffusion.runtimes.graph import Graph, open_components, open_graphs
from edgediffusion.runtimes.pipeline import Pipeline
from edgediffusion.runtimes.request import Request, plan

PROMPTS = ("a red heart", "an ankle boot", "")
MOST_DB = 150.0  # of pictures that are equal; float32 cannot tell anything closer
_ROLES = ("encode", CONTROL, "denoise", "decode", "encode_image")
_MOMENT = 0.421  # of the noise schedule, for the timestep of a single call


@dataclass(frozen=True)
class ComponentError:
    """One output of one graph at one size: the largest difference over the largest magnitude of torch's output."""

    component: str
    output: str
    shape: tuple[int, ...]
    relative_error: float


@dataclass(frozen=True)
class PictureError:
    """One picture: the largest difference at any pixel in steps of 1/255, and the PSNR for a range of 1. Some take no prompt."""

    prompt: str
    largest_255: float
    psnr_db: float


@dataclass(frozen=True)
class Validation:
    """``relative_error``, ``largest_255`` and ``psnr_db`` are the worst of those below them."""

    sampler: str
    steps: int
    guidance_scale: float
    seed: int
    relative_error: float
    largest_255: float
    psnr_db: float
    components: tuple[ComponentError, ...]
    pictures: tuple[PictureError, ...]


def validate(
    bundle: Bundle,
    source: str | Path,
    *,
    prompts: Sequence[str] = (),
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    sampler: str | None = None,
    target: str | None = None,
    progress: Progress | None = None,
) -> Validation:
    """Compare a bundle with the folder it was exported from, which is loaded in float32.

    Graphs are compared at two batch and two picture sizes with random inputs, those of a cut with what the whole gave or the
    cut's head. Pictures begin with the same noise; what is None is as the bundle recommends. ``target`` names the engines to
    compare, as for ``Pipeline.from_bundle``.

    Raises:
        SourceError: the source cannot be read. BundleError: the bundle cannot draw.
        ArgumentError: it was made of a pipeline of another class, or no such sampler.
    """
    origin = Source.open(Path(source))
    _check_origin(bundle, origin)
    if bundle.sampling is None:
        raise BundleError(f"The bundle '{bundle.path}' cannot draw", do="Export a whole pipeline.")
    sampling, prompts = bundle.sampling, tuple(prompts) or PROMPTS
    settled = Run(
        sampler or sampling.sampler, steps or sampling.steps, sampling.guidance_scale if guidance_scale is None else guidance_scale, seed
    )
    plan(Request("", num_inference_steps=settled.steps, sampler=settled.sampler, guidance_scale=settled.guidance_scale), sampling)
    graphs = {graph.name: graph for graph in open_graphs(bundle, _ROLES, target=target, threads=None)}
    parts = [part for part in family_of(origin)[1].parts(origin) if part.name in graphs]
    total = len(parts) + len(prompts)
    components: list[ComponentError] = []
    for done, part in enumerate(parts):
        _tell(progress, f"comparing {part.name}", done / total)
        calls = _calls(part, origin.load(part.network), sampling)
        components += _compare_graph(graphs[part.name], calls)
        for component in _cut_out(bundle, part):  # one at a time: each may hold as many weights as the whole
            (graph,) = open_components(bundle, [component], target=target, threads=None)
            components += _compare_graph(graph, calls)
    ours, theirs = Pipeline(bundle, {name: graph.session for name, graph in graphs.items()}), _diffusers(origin, settled.sampler)
    pictures = []
    for done, prompt in enumerate(prompts if takes_prompt(theirs) else ("",), start=len(parts)):
        _tell(progress, "drawing", done / total)
        pictures.append(_compare_pictures(prompt, ours, theirs, settled))
    _tell(progress, "compared", 1.0)
    return _summary(settled, tuple(components), tuple(pictures))


def _cut_out(bundle: Bundle, part: Part) -> list[Component]:
    """The graphs that were cut out of a part's."""
    if part.role == CONTROL:
        return [c for c in bundle.with_role(SHALLOW_CONTROL) if c.name.startswith(f"{part.name}_shallow_")]
    return [c for c in bundle.components if part.cuts is not None and c.role in CUT_ROLES]


def _summary(run: Run, components: tuple[ComponentError, ...], pictures: tuple[PictureError, ...]) -> Validation:
    return Validation(
        run.sampler,
        run.steps,
        run.guidance_scale,
        run.seed,
        relative_error=max(c.relative_error for c in components),
        largest_255=max(p.largest_255 for p in pictures),
        psnr_db=min(p.psnr_db for p in pictures),
        components=components,
        pictures=pictures,
    )


def _check_origin(bundle: Bundle, source: Source) -> None:
    refuse_fused(bundle)
    made_of = bundle.history[0].arguments.get("pipeline", source.class_name) if bundle.history else source.class_name
    if made_of != source.class_name:
        raise ArgumentError(
            "The bundle was exported from a pipeline of another class",
            got=f"{made_of} in the bundle, {source.class_name} in '{source.path}'",
            do="Give the folder that the bundle was exported from.",
        )


@dataclass
class _Call:
    """One call of a network: what graphs are fed, which is also what other graphs gave; and what torch returned, by name."""

    arrays: dict[str, np.ndarray]
    expected: Mapping[str, np.ndarray]


def _calls(part: Part, network: torch.nn.Module, sampling: Sampling) -> list[_Call]:
    """At two batch sizes and two picture sizes."""
    wrapped = part.wrap(network).eval()
    generator = np.random.default_rng(0)
    calls = []
    for batch, extra in ((1, 0), (2, 0 if sampling.fixed_size else sampling.size_multiple)):
        sizes = _sizes(sampling, batch, extra)
        feeds = {tensor.name: _example(tensor, sizes, network, sampling, generator) for tensor in part.inputs}
        with torch.no_grad(), quiet():
            found = wrapped(**{name: torch.from_numpy(feed) for name, feed in feeds.items()})
        outputs = zip(part.outputs, found if isinstance(found, tuple) else (found,), strict=True)
        calls.append(_Call(feeds, {tensor.name: expected.numpy() for tensor, expected in outputs}))
    return calls


def _compare_graph(graph: Graph, calls: Sequence[_Call]) -> Iterator[ComponentError]:
    """Run a graph for every call, and keep what it gives with what the calls' other graphs can be fed."""
    for call in calls:
        names = [spec.name for spec in graph.session.inputs]
        binding = graph.bind({name: call.arrays[name].shape for name in names})
        for name in names:
            binding.inputs[name][...] = call.arrays[name]
        binding.run()
        for name, expected in call.expected.items():
            if name in binding.outputs:
                error = _relative(binding.outputs[name].astype(np.float32), expected)
                yield ComponentError(graph.name, name, expected.shape, error)
        call.arrays.update({name: array.copy() for name, array in binding.outputs.items()})


def _sizes(sampling: Sampling, batch: int, extra: int) -> dict[str, int]:
    """Of every free axis, for a picture that is ``extra`` pixels higher than the usual one."""
    image = {"image_height": sampling.height + extra, "image_width": sampling.width}
    return {"batch": batch, **image, **{name.removeprefix("image_"): size // sampling.downsampling for name, size in image.items()}}


def _example(tensor: Tensor, sizes: Mapping[str, int], network: Any, sampling: Sampling, generator: np.random.Generator) -> np.ndarray:
    """Random values of the kind that the input takes: ids of tokens, a timestep, or numbers of about unit size."""
    shape = tuple(_size(axis, sizes) for axis in tensor.axes)
    if tensor.dtype.startswith("int"):
        known = getattr(network.config, "vocab_size", sampling.classes)
        return generator.integers(0, known, shape)
    if tensor.name == "timestep":
        return np.full(shape, np.float32(_moment(sampling)))
    return generator.standard_normal(shape, dtype=np.float32)


def _size(axis: int | Axis, sizes: Mapping[str, int]) -> int:
    """Of an axis: its own, that of what it is a part of, or that of its example, where it has nothing to do with pictures."""
    found = axis if isinstance(axis, int) else axis_size(axis.name, sizes)
    return found if found is not None else axis.example  # type: ignore[union-attr]


def _moment(sampling: Sampling) -> float:
    """The time step of a single call: one that the network takes, if it was folded."""
    wanted = int(_MOMENT * sampling.schedule.train_steps)
    return wanted if sampling.folded is None else min(sampling.folded.timesteps, key=lambda t: abs(t - wanted))


def _compare_pictures(prompt: str, ours: Pipeline, theirs: Any, run: Run) -> PictureError:
    mine, other = asked(theirs, ours.sampling, prompt, run).draw(ours, theirs)
    difference = np.abs(mine.astype(np.float64) - other)
    mean_square = float(np.mean(difference**2))
    psnr = MOST_DB if mean_square == 0 else min(MOST_DB, -10.0 * math.log10(mean_square))
    return PictureError(prompt, float(difference.max() * 255), psnr)


def _diffusers(source: Source, sampler: str) -> Any:
    """diffusers' own pipeline in float32, with its scheduler for ``sampler``."""
    # diffusers refuses some pipelines that lack a component, unless it is told so; and none is drawn with a safety checker.
    left_out = dict.fromkeys([name for name, entry in source.index.items() if entry == [None, None]])
    left_out |= {"safety_checker": None} if "safety_checker" in source.components else {}
    with quiet():
        pipeline: Any = getattr(diffusers, source.class_name).from_pretrained(
            source.path, torch_dtype=torch.float32, local_files_only=True, variant=source.variant(), **left_out
        )
        pipeline.scheduler = scheduler_of(sampler, pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), np.finfo(np.float32).tiny))


def _tell(progress: Progress | None, what: str, part: float) -> None:
    if progress is not None:
        progress(what, part)
