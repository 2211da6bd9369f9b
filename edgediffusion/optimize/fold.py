"""Fold: a bundle's denoiser with a table of what its time embedding gives, in place of the embedding."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from edgediffusion import __version__, files
from edgediffusion.bundle import Bundle, Component, Folded, Sampling, Verb, write
from edgediffusion.errors import ArgumentError, BundleError
from edgediffusion.files import link_or_copy
from edgediffusion.optimize.cuts import cut_again, parts_of
from edgediffusion.optimize.graph_file import load_graph, store_weights
from edgediffusion.registry import find
from edgediffusion.runtimes.request import Plan, Request, plan

Progress = Callable[[str, float], None]
WEIGHTS = "folded.safetensors"
TIMESTEP = "timestep"


@dataclass(frozen=True)
class FoldedGraph:
    """What folding did to one graph; bytes are of its ONNX file and its weights. ``joined`` as in ``TimeBlock``."""

    nodes_before: int
    nodes_after: int
    bytes_before: int
    bytes_after: int
    values: int
    joined: tuple[str, ...]


def fold(
    bundle: Bundle,
    output: str | Path,
    *,
    steps: int | None = None,
    sampler: str | None = None,
    progress: Progress = lambda label, part: None,
) -> Bundle:
    """Write the bundle with its time embedding computed for the time steps that ``sampler`` calls the network at.

    Both are by default what the bundle recommends, and what the new one recommends. It draws with any sampler and number of
    steps whose time steps are among these, and refuses others. What happened to each graph is in the new bundle's history,
    as the fields of ``FoldedGraph``.

    Raises:
        UnknownName: no such sampler. ArgumentError: steps that it cannot make, a bundle that is folded already.
        BundleError: a bundle that cannot draw, or whose network has no time embedding that can be folded.
        OutputError: ``output`` exists or cannot be written.
    """
    sampling, chosen = _foldable(bundle)
    settled = plan(Request("", num_inference_steps=steps, sampler=sampler), sampling)
    timesteps = tuple(dict.fromkeys(float(np.float32(point.timestep)) for point in settled.points.at))
    cut_out = parts_of(bundle, chosen)
    folders = tuple(component.model.rsplit("/", 1)[0] + "/" for component in (*chosen, *cut_out))
    replaced = [name for name in bundle.files if name.startswith(folders) and name.endswith((".onnx", ".safetensors"))]
    with files.new_folder(Path(output)) as folder:
        kept = [name for name in bundle.files if name not in replaced and not name.startswith("engines/")]
        for name in kept:
            link_or_copy(bundle.path / name, folder / name)
        reports = {}
        for at, component in enumerate(chosen):
            progress(f"folding {component.name}", at / len(chosen))
            reports[component.name] = asdict(_fold_graph(bundle, component, folder, settled, timesteps))
        progress("writing", 1.0)
        components = cut_again(cut_out, bundle.components, folder)
        folded = Folded(settled.sampler_name, settled.steps, timesteps)
        arguments = {"sampler": folded.sampler, "steps": folded.steps, "graphs": reports}
        versions = {"edgediffusion": __version__, "onnx-ir": version("onnx-ir"), "onnxruntime": version("onnxruntime")}
        write(
            folder,
            family=bundle.family,
            components=tuple(components),
            sampling=replace(sampling, sampler=folded.sampler, steps=folded.steps, folded=folded),
            history=(*bundle.history, Verb("fold", arguments, versions)),
            known={name: bundle.files[name] for name in kept},
        )
    return Bundle.open(output, verify=False)


def _foldable(bundle: Bundle) -> tuple[Sampling, tuple[Component, ...]]:
    """The facts about sampling, and the graphs to fold; everything that a manifest can tell is refused here."""
    chosen = bundle.with_role("denoise")
    if bundle.sampling is None or not chosen:
        raise BundleError(f"The bundle '{bundle.path}' cannot draw", do="Export a whole pipeline.")
    if done := bundle.sampling.folded:
        raise ArgumentError(
            f"The bundle '{bundle.path}' is folded already, for {done.steps} steps of the sampler '{done.sampler}'",
            do="Fold the bundle that it was made from.",
        )
    for component in chosen:
        specs = {spec.name: spec for spec in component.inputs}
        if TIMESTEP not in specs:
            raise BundleError(f"The graph '{component.name}' has no input '{TIMESTEP}', so there is nothing to fold", got=", ".join(specs))
        if specs[TIMESTEP].shape not in ((), (1,)):
            raise BundleError(
                f"The graph '{component.name}' takes a time step for each row, and only one for all rows can be folded",
                got=f"{TIMESTEP} {list(specs[TIMESTEP].shape)}",
                do="Export the pipeline without --row-timesteps.",
            )
    return bundle.sampling, chosen


def _fold_graph(bundle: Bundle, component: Component, folder: Path, settled: Plan, timesteps: tuple[float, ...]) -> FoldedGraph:
    import onnx_ir as ir

    from edgediffusion.optimize.passes.fold_timestep import fold_timestep, time_block

    model = load_graph(bundle.path / component.model)
    before, block = len(model.graph), time_block(model.graph)
    if not block.frontier:
        raise BundleError(f"In the graph '{component.name}' nothing depends on the time step alone, so there is nothing to fold")
    dtype = np.dtype(next(spec.dtype for spec in component.inputs if spec.name == TIMESTEP))
    fed = np.array([round(t) if dtype.kind in "iu" else t for t in timesteps], dtype)  # as the sampling loop feeds them
    fold_timestep(model, block, fed, _rows(model, block, fed, batch=2 if settled.classifier_free else 1))
    target = folder / component.model
    target.parent.mkdir(exist_ok=True)
    store_weights(model, target.parent, WEIGHTS)
    ir.save(model, target)
    return FoldedGraph(
        nodes_before=before,
        nodes_after=len(model.graph),
        bytes_before=_stored_bytes(bundle.path / component.model),
        bytes_after=_stored_bytes(target),
        values=len(block.frontier),
        joined=block.joined,
    )


def _stored_bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model.parent.iterdir() if file.suffix in (".onnx", ".safetensors"))


def _rows(model: Any, block: Any, timesteps: np.ndarray, *, batch: int) -> dict[str, np.ndarray]:
    """What each value of the frontier is at each time step, [steps, ...] by name.

    They are computed as in the whole graph: by the same engine, a step at a time, and with as many rows as one picture has,
    because a matrix product rounds one row otherwise than two.
    """
    import onnx_ir as ir

    from edgediffusion.optimize.passes.fold_timestep import block_model

    alone = block_model(model, block)
    found: dict[str, list[np.ndarray]] = {str(value.name): [] for value in block.frontier}
    with tempfile.TemporaryDirectory() as temporary:
        store_weights(alone, Path(temporary))
        ir.save(alone, Path(temporary) / "model.onnx")
        session = find("runtimes.engines", "onnxruntime").open_session(Path(temporary) / "model.onnx", threads=1)
        axes = {axis: 1 for spec in session.inputs for axis in spec.shape if isinstance(axis, str)}  # only the batch is looked at
        binding = session.bind({**axes, "batch": batch})
        for timestep in timesteps:
            binding.inputs[TIMESTEP][...] = timestep
            binding.run()
            for name, array in binding.outputs.items():
                found[name].append(_one_row(name, array, batch))
    return {name: np.concatenate(rows) for name, rows in found.items()}


def _one_row(name: str, array: np.ndarray, batch: int) -> np.ndarray:
    """[1, ...] of a value all of whose rows are the same."""
    if array.ndim == 0 or len(array) not in (1, batch) or not np.allclose(array, array[:1], rtol=1e-5, atol=1e-6):
        raise BundleError(f"The value '{name}' of the time embedding is not the same for every row", got=f"shape {array.shape}")
    return array[:1].copy()
