"""Which modules overflow in float16, found by drawing pictures with the float32 bundle and looking at every value of its graphs.

The magnitudes are those of the bundle's own prompts and steps, so a margin is left: a value that comes within a factor of
``MARGIN`` of the limit counts. What is proposed is the smallest module that such a value does not leave, since what a kept
module returns is rounded to float16 behind it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgediffusion.bundle import Bundle, Component, TensorSpec
from edgediffusion.errors import ArgumentError
from edgediffusion.optimize.overflow_modules import Peak, Tapped, kept_name, tap
from edgediffusion.registry import find
from edgediffusion.runtimes.engines import NOT_SHARED, Binding, Session
from edgediffusion.runtimes.pipeline import Pipeline

LIMIT, MARGIN = 65504.0, 2.0  # the largest float16
TAP = "edgediffusion.magnitudes"
_ROLES = ("encode", "denoise", "decode")
_SHOWN = 20

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Value:
    """A value of a graph beyond the margin: the node that gives it, and the smallest module that it does not leave."""

    component: str
    operator: str
    largest: float
    keep: str


@dataclass(frozen=True)
class Part:
    """A graph: the largest magnitude of all its values, and how many times as large it might be in float16."""

    component: str
    values: int
    largest: float
    headroom: float


@dataclass(frozen=True)
class Overflow:
    """``keep`` is what to say to ``export --keep-fp32``; ``values`` are the largest ones beyond the margin."""

    keep: tuple[str, ...]
    parts: tuple[Part, ...]
    values: tuple[Value, ...]


def find_overflow(
    bundle: Bundle, *, prompts: Sequence[str] = ("",), steps: int | None = None, seed: int = 0, progress: Progress | None = None
) -> Overflow:
    """Draw a picture of each prompt, and look at what every node of the text encoders, the denoiser and the decoder gives.

    Raises:
        ArgumentError: the bundle is not of float32, or no prompts. BundleError: it cannot draw. EngineError: it cannot be run.
    """
    exported = next((verb.arguments.get("dtype") for verb in bundle.history if verb.name == "export"), None)
    quantized = any(verb.name == "quantize" for verb in bundle.history)
    if quantized or exported not in (None, "float32"):
        raise ArgumentError(
            f"The bundle '{bundle.path}' is not of float32",
            got="a quantized one" if quantized else exported,
            do="Export the pipeline with --dtype fp32 for this check.",
        )
    if not prompts:
        raise ArgumentError("There is no prompt to draw", do="Give one or more.")
    components = [c for c in bundle.components if c.role in _ROLES]
    with tempfile.TemporaryDirectory(dir=bundle.path.parent, prefix=".overflow-") as folder:
        watched = {c.name: _watch(bundle, c, Path(folder) / c.name) for c in components}
        pipeline = Pipeline(bundle, watched)
        for done, prompt in enumerate(prompts):
            if progress is not None:
                progress(f"drawing {done + 1} of {len(prompts)}", done / len(prompts))
            pipeline(prompt if bundle.with_role("encode") else None, num_inference_steps=steps, seed=seed + done)
    found = {component.name: watched[component.name].tapped.peaks(watched[component.name].largest) for component in components}
    values = tuple(
        Value(c.name, peak.operator, peak.largest, kept_name(c, peak.module))
        for c in components
        for peak in found[c.name]
        if not peak.largest * MARGIN <= LIMIT
    )
    parts = tuple(_part(component, found[component.name]) for component in components)
    keep = _outermost([value.keep for value in values])
    return Overflow(keep, parts, tuple(sorted(values, key=lambda value: -value.largest)[:_SHOWN]))


def _part(component: Component, peaks: Sequence[Peak]) -> Part:
    largest = max((peak.largest for peak in peaks), default=0.0)
    return Part(component.name, len(peaks), largest, LIMIT / largest if largest else float("inf"))


def _outermost(names: Sequence[str]) -> tuple[str, ...]:
    """Without those that are within another one."""
    known = sorted(set(names))
    return tuple(name for name in known if not any(name.startswith(f"{other}.") for other in known))


def _watch(bundle: Bundle, component: Component, folder: Path) -> Watched:
    folder.mkdir()
    tapped = tap(bundle.path / component.model, folder / "model.onnx", TAP)
    return Watched(find("runtimes.engines", "onnxruntime").open_session(folder / "model.onnx"), tapped)


class Watched:
    """A session that remembers the largest magnitudes; to who runs it, the graph is the one without the tap."""

    def __init__(self, session: Session, tapped: Tapped):
        self._session, self.tapped = session, tapped
        self.inputs: tuple[TensorSpec, ...] = session.inputs
        self.outputs: tuple[TensorSpec, ...] = tuple(spec for spec in session.outputs if spec.name != TAP)
        self.largest = np.zeros(len(tapped.nodes), np.float32)

    def bind(self, axes: Mapping[str, int], shared: Mapping[str, np.ndarray] = NOT_SHARED) -> Binding:
        return WatchedBinding(self._session.bind(axes, shared), self.largest)


class WatchedBinding:
    def __init__(self, binding: Binding, largest: np.ndarray):
        self._binding, self._largest = binding, largest
        self.inputs: Mapping[str, np.ndarray] = binding.inputs
        self.outputs: Mapping[str, np.ndarray] = {name: array for name, array in binding.outputs.items() if name != TAP}

    def run(self) -> None:
        self._binding.run()
        found = self._binding.outputs[TAP]
        np.maximum(self._largest, np.where(np.isnan(found), np.inf, found), out=self._largest)
