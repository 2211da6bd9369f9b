"""Whether a quantized graph gives finite numbers, and which layer is the first that does not."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgediffusion.bundle import Bundle, Component
from edgediffusion.errors import BundleError, MissingExtra
from edgediffusion.registry import find
from edgediffusion.runtimes.graph import Graph

Feeds = Mapping[str, np.ndarray]


def bind(engine: Any, component: Component, file: Path, feeds: Feeds, *, threads: int | None = None) -> Any:
    """The graph of ``file``, loaded by an engine, with buffers for ``feeds`` and these written into them."""
    binding = Graph(component, engine.open_session(file, threads=threads)).bind({name: array.shape for name, array in feeds.items()})
    write(binding, feeds)
    return binding


def write(binding: Any, feeds: Feeds) -> None:
    for name, array in feeds.items():
        binding.inputs[name][...] = array


def check_finite(engine: Any, component: Component, file: Path, reference: Path, items: Sequence[Feeds]) -> None:
    """Run ``file`` on each of ``items``. ``reference`` is the float graph, which has the layers' names.

    Raises:
        BundleError: the graph gives numbers that are not finite; the message names the first layer that does.
        EngineError: the engine cannot load or run the graph.
    """
    binding = None
    for item in items:
        binding = binding or bind(engine, component, file, item)
        write(binding, item)
        binding.run()
        if not all(np.isfinite(array).all() for array in binding.outputs.values()):
            raise not_finite(engine, component, file, reference, item)


def not_finite(engine: Any, component: Component, file: Path, reference: Path, item: Feeds) -> BundleError:
    """The error for a graph that gives numbers which are not finite with the inputs ``item``."""
    layer = first_not_finite(engine, component, file, reference, item)
    where = f"The layer '{layer}'" if layer else f"The graph '{component.name}', though none of its layers,"
    return BundleError(
        f"{where} gives numbers that are not finite once the graph is quantized",
        got="NaN or infinity",
        do="A float16 graph can overflow: export it with --dtype fp32. If it is float32, calibrate again, or keep the layer float: "
        "name it in the recipe's exclude.",
    )


def first_not_finite(engine: Any, component: Component, file: Path, reference: Path, item: Feeds) -> str | None:
    """The first layer, in the graph's order, whose output is not finite: all of them become outputs of a copy of the graph."""
    import onnx_ir as ir

    from edgediffusion.optimize.graph_file import load_graph
    from edgediffusion.optimize.graph_layers import find_layers

    names = {layer.node.outputs[0].name: layer.name for layer in find_layers(load_graph(reference).graph)}
    model = load_graph(file)
    there = {value.name for value in model.graph.outputs}
    for node in model.graph:
        for value in node.outputs:
            if value.name in names and value.name not in there:
                model.graph.outputs.append(value)
    with tempfile.TemporaryDirectory() as folder:
        ir.save(model, Path(folder) / "model.onnx")
        session = engine.open_session(Path(folder) / "model.onnx")
        binding = Graph(replace(component, outputs=session.outputs), session).bind({name: array.shape for name, array in item.items()})
        write(binding, item)
        binding.run()
        order = [str(value.name) for node in model.graph for value in node.outputs if value.name in names]
        return next((names[name] for name in order if not np.isfinite(binding.outputs[name]).all()), None)


def noise_feeds(bundle: Bundle, component: Component, *, seed: int = 0) -> dict[str, np.ndarray] | None:
    """Inputs of one call at the bundle's default size: normal noise, the middle of the schedule. None where sizes are not known."""
    facts = bundle.sampling
    if facts is None:
        return None
    axes = {"batch": 2, "height": facts.height // facts.downsampling, "width": facts.width // facts.downsampling}
    rng = np.random.default_rng(seed)
    feeds = {}
    for spec in component.inputs:
        if any(isinstance(size, str) and size not in axes for size in spec.shape):
            return None
        shape = [size if isinstance(size, int) else axes[size] for size in spec.shape]
        middle = facts.schedule.train_steps / 2
        feeds[spec.name] = (np.full(shape, middle) if spec.name == "timestep" else rng.standard_normal(shape)).astype(spec.dtype)
    return feeds


def check_quantized(bundle: Bundle, component: Component, file: Path, engine_name: str) -> None:
    """One call of the quantized graph ``file`` of a float ``bundle``'s component, where its engine is here.

    Raises:
        BundleError: what it gives is not finite.
    """
    feeds = noise_feeds(bundle, component)
    engine = find("runtimes.engines", engine_name, kind="engine")
    try:
        engine.version()
    except MissingExtra:  # quantized here for another machine
        return
    if feeds is not None:
        check_finite(engine, component, file, bundle.path / component.model, [feeds])
