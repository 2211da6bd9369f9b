"""Whether the layers of a quantized graph give finite numbers, and which is the first that does not."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgediffusion.bundle import Bundle, Component
from edgediffusion.errors import BundleError, MissingExtra
from edgediffusion.files import link_or_copy
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
    """Run ``file`` on each of ``items`` and look at what every layer gives: an integer behind it would hide what is not finite.

    ``reference`` is the float graph, which has the layers' names.

    Raises:
        BundleError: numbers that are not finite; the message names the first layer, in the graph's order, that gives them.
        EngineError: the engine cannot load or run the graph.
    """
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".check-") as folder:
        names = _tap(file, reference, Path(folder) / "model.onnx")
        session = engine.open_session(Path(folder) / "model.onnx")
        binding = Graph(replace(component, outputs=session.outputs), session).bind({n: a.shape for n, a in items[0].items()})
        for item in items:
            write(binding, item)
            binding.run()
            bad = [value for value in (*names, *binding.outputs) if not np.isfinite(binding.outputs[value]).all()]
            if bad:
                raise _not_finite(names.get(bad[0]), component)


def _tap(file: Path, reference: Path, tapped: Path) -> dict[str, str]:
    """Write a copy of the graph that gives what each of its layers gives; the layers' names by output, in the graph's order."""
    import onnx_ir as ir

    from edgediffusion.optimize.graph_file import load_graph
    from edgediffusion.optimize.graph_layers import find_layers

    layers = {layer.node.outputs[0].name: layer.name for layer in find_layers(load_graph(reference).graph)}
    model = ir.load(file)
    tensors = [value.const_value for value in model.graph.initializers.values()]
    for location in {tensor.location for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}:
        link_or_copy(file.parent / location, tapped.parent / location)
    there = {value.name for value in model.graph.outputs}
    found = [value for node in model.graph for value in node.outputs if value.name in layers]
    model.graph.outputs.extend(value for value in found if value.name not in there)
    ir.save(model, tapped)
    return {str(value.name): layers[value.name] for value in found}


def _not_finite(layer: str | None, component: Component) -> BundleError:
    where = f"The layer '{layer}'" if layer else f"The graph '{component.name}', though none of its layers,"
    return BundleError(
        f"{where} gives numbers that are not finite once the graph is quantized",
        got="NaN or infinity",
        do="A float16 graph can overflow: export it with --dtype fp32. If it is float32, calibrate again, or keep the layer float: "
        "name it in the recipe's exclude.",
    )


def noise_feeds(bundle: Bundle, component: Component, *, seed: int = 0) -> dict[str, np.ndarray] | None:
    """Inputs of one call at a small size: normal noise, the middle of the schedule. None where sizes are not known.

    An eighth of the bundle's default size, if a multiple that it can draw: at the whole size attention alone takes gigabytes.
    """
    facts = bundle.sampling
    if facts is None:
        return None
    height, width = (-(-size // (8 * facts.size_multiple)) * facts.size_multiple for size in (facts.height, facts.width))
    axes = {"batch": 2, "height": height // facts.downsampling, "width": width // facts.downsampling}
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
        BundleError: what a layer gives is not finite.
    """
    feeds = noise_feeds(bundle, component)
    engine = find("runtimes.engines", engine_name, kind="engine")
    try:
        engine.version()
    except MissingExtra:  # quantized here for another machine
        return
    if not getattr(engine, "reads_onnx", True):  # TensorRT runs engines, which are built for sizes and a GPU
        return
    if feeds is not None:
        check_finite(engine, component, file, bundle.path / component.model, [feeds])
