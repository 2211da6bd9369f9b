"""One run of a graph that came from outside: whether it is what was said of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edgediffusion.bundle import Component
from edgediffusion.errors import ArgumentError, SourceError
from edgediffusion.runtimes.engines import onnxruntime
from edgediffusion.runtimes.graph import Graph
from edgediffusion.runtimes.network import PREDICTION

# What a graph of a role must take, and the first thing that it must give; the loop knows these names.
_WANTED: Mapping[str, tuple[tuple[str, ...], str]] = {
    "denoise": (("sample", "timestep"), PREDICTION),
    "decode": (("latent_sample",), "sample"),
    "encode_image": (("sample",), "latent_parameters"),
    "encode": ((), ""),
}
ROLES = tuple(_WANTED)


def output_of(role: str) -> tuple[str, ...]:
    """The names that a role has for what its graph gives, where it is one thing."""
    return tuple(name for name in _WANTED.get(role, ((), ""))[1:] if isinstance(name, str) and name)


def check_role(component: Component) -> None:
    """Raises ArgumentError: the graph's inputs and outputs are not those of its role, by name or by shape."""
    if component.role not in _WANTED:
        raise ArgumentError(f"No graph can be brought in for the role '{component.role}'", allowed=", ".join(ROLES))
    inputs, output = _WANTED[component.role]
    found = {spec.name: spec for spec in (*component.inputs, *component.outputs)}
    lacking = [name for name in (*inputs, output) if name and name not in found]
    if lacking:
        raise ArgumentError(
            f"A graph for the role '{component.role}' takes {', '.join(inputs)} and gives {output}",
            got=f"{', '.join(s.name for s in component.inputs)} and {', '.join(s.name for s in component.outputs)}",
            do=f"Say what is called '{lacking[0]}' here: rename its tensor.",
        )
    if component.role == "denoise":
        _check_denoiser(component)


def run_once(component: Component, file: Path, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What ONNX Runtime makes of ``feeds``: arrays by name.

    Raises:
        SourceError: an output is not finite. EngineError: ONNX Runtime cannot load the graph, or not run it with these shapes.
    """
    graph = Graph(component, onnxruntime.open_session(file))
    binding = graph.bind({name: array.shape for name, array in feeds.items()})
    for name, array in feeds.items():
        binding.inputs[name][...] = array
    binding.run()
    for name, array in binding.outputs.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise SourceError(
                f"The output '{name}' of '{component.name}' is not finite",
                got=f"{np.count_nonzero(~np.isfinite(array))} of {array.size} values",
            )
    return {name: array.copy() for name, array in binding.outputs.items()}


def largest_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Over the largest magnitude of what was expected; infinite where shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    if not found.size:
        return 0.0
    largest = max(float(np.abs(expected.astype(np.float64)).max()), float(np.finfo(np.float32).tiny))
    return float(np.abs(found.astype(np.float64) - expected).max() / largest)


def _check_denoiser(component: Component) -> None:
    shapes = {spec.name: spec.shape for spec in (*component.inputs, *component.outputs)}
    sample, prediction = shapes["sample"], shapes[PREDICTION]
    if len(sample) != len(prediction) or any(
        a != b for a, b in zip(sample, prediction, strict=True) if isinstance(a, int) == isinstance(b, int)
    ):
        raise ArgumentError(
            "A denoiser predicts something of its sample's shape",
            got=f"{sample} to {prediction}",
            do="Take the role 'decode' for a network whose output has another shape.",
        )
    if len(shapes["timestep"]) > 1:
        raise ArgumentError("A time step is one number, or one for each row", got=f"'timestep' of shape {shapes['timestep']}")
