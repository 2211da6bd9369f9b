"""The quantization state: what calibration found, apart from any engine.

Keys are ``component/module path`` as the checkpoint names its modules, so one state serves every graph and every target
made of the same weights. A state is a folder: ``state.json``, sorted and readable, so that two can be compared with
``diff``, and ``vectors.safetensors`` with the numbers by channel, whose sha256 the former holds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgediffusion.bundle import Bundle, Component
from edgediffusion.errors import ArgumentError
from edgediffusion.files import dump_json, new_folder

FORMAT = 3
MANIFEST, VECTORS = "state.json", "vectors.safetensors"


@dataclass(frozen=True, eq=False)
class Ranges:
    """What a layer's input and output span in one stage of sampling; as in ``LayerState``."""

    input_low: np.ndarray
    input_high: np.ndarray
    output_low: np.ndarray
    output_high: np.ndarray
    input_clip: float = 1.0


@dataclass(frozen=True, eq=False)
class LayerState:
    """One layer.

    ``factors`` are the input's channels' balance f: the layer is quantized as (x / f) (f w). The lowest and highest
    values of the input (of x itself) and the output are given by channel, as float32 vectors; a quantizer takes them
    times ``input_clip``, ``output_clip``. ``weight_amax`` bounds f w: [out], or [out, groups] of its input channels. ``codes``,
    int8 and shaped like the weight, are its rounding where that is not to nearest; ``bias`` [out] takes the place of the layer's
    where it was learned. ``up`` [out, rank] and ``down`` [rank, in] are a float branch: what is quantized is f w - up down.
    ``stages`` are the ranges in each stage of sampling, where a recipe asks for several; the layer's own are those of all. ``formats``
    are those that were chosen for weights and activations, where a recipe leaves it to the calibration.
    """

    factors: np.ndarray
    input_low: np.ndarray
    input_high: np.ndarray
    output_low: np.ndarray
    output_high: np.ndarray
    weight_amax: np.ndarray
    input_clip: float = 1.0
    output_clip: float = 1.0
    codes: np.ndarray | None = None
    bias: np.ndarray | None = None
    up: np.ndarray | None = None
    down: np.ndarray | None = None
    stages: tuple[Ranges, ...] = ()
    formats: tuple[str, str] = ("", "")

    def of_stage(self, stage: int) -> LayerState:
        """The layer with the ranges of one stage."""
        return replace(self, stages=(), **vars(self.stages[stage])) if self.stages else self

    def without_branch(self, weight: np.ndarray) -> np.ndarray:
        """f w [out, in] less what the float branch computes."""
        return weight if self.up is None or self.down is None else weight - self.up @ self.down

    def input_range(self, channels: slice = slice(None)) -> tuple[float, float]:
        """Lowest and highest value of x / f, clipped, over some channels or all."""
        low, high = self.input_low[channels] / self.factors[channels], self.input_high[channels] / self.factors[channels]
        return float(low.min()) * self.input_clip, float(high.max()) * self.input_clip

    def output_range(self) -> tuple[float, float]:
        return float(self.output_low.min()) * self.output_clip, float(self.output_high.max()) * self.output_clip

    @property
    def is_constant(self) -> bool:
        """Whether the input never changed: a range of no width has no scale."""
        low, high = self.input_range()
        return low == high


_ARRAYS = ("factors", "input_low", "input_high", "output_low", "output_high", "weight_amax", "codes", "bias", "up", "down")
_BOUNDS = ("input_low", "input_high", "output_low", "output_high")
_OPTIONAL = ("codes", "bias", "up", "down")


@dataclass(frozen=True, eq=False)
class QuantizationState:
    """``weights`` says which weights the state belongs to (see ``weights_digest``), ``calibration`` how it was found,
    ``recipe`` for which number formats, ``below`` the time steps below which each stage of sampling but the first begins."""

    weights: str
    calibration: Mapping[str, Any]
    layers: Mapping[str, LayerState]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    below: tuple[float, ...] = ()

    @property
    def digest(self) -> str:
        return hashlib.sha256(dump_json(self._manifest()).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write the folder; an existing one is refused (OutputError)."""
        from edgediffusion.registry import require

        library = require("safetensors.numpy", extra="optimize", purpose="Writing a quantization state")
        with new_folder(path) as folder:
            library.save_file(self._vectors(), folder / VECTORS)
            (folder / MANIFEST).write_text(dump_json(self._manifest()), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> QuantizationState:
        """Read a state.

        Raises:
            ArgumentError: there is no such state, it is none, of another format, or its parts do not belong together.
        """
        from edgediffusion.registry import require

        library = require("safetensors.numpy", extra="optimize", purpose="Reading a quantization state")
        content = _read_manifest(Path(path))
        try:
            vectors = library.load_file(Path(path) / VECTORS)
        except FileNotFoundError:
            raise ArgumentError(f"The quantization state '{path}' lacks its file '{VECTORS}'", do="Calibrate again.") from None
        except Exception as error:  # the library has an error class of its own, of no narrower base
            raise ArgumentError(f"'{path}/{VECTORS}' cannot be read: {error}", do="Calibrate again.") from None
        if _vectors_digest(vectors) != content.get("vectors"):
            raise ArgumentError(f"'{path}/{VECTORS}' is not the file that '{MANIFEST}' was written with", do="Calibrate again.")
        try:
            layers = {name: _layer(name, entry, vectors) for name, entry in content["layers"].items()}
            below = tuple(float(t) for t in content["below"])
            return cls(content["weights"], content["calibration"], layers, content["recipe"], content["versions"], below)
        except (KeyError, TypeError, AttributeError) as error:
            raise ArgumentError(f"The quantization state '{path}' lacks or misstates a field: {error}", do="Calibrate again.") from None

    def _manifest(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "weights": self.weights,
            "calibration": self.calibration,
            "recipe": self.recipe,
            "below": list(self.below),
            "versions": self.versions,
            "layers": {name: _entry(layer) for name, layer in self.layers.items()},
            "vectors": _vectors_digest(self._vectors()),
        }

    def _vectors(self) -> dict[str, np.ndarray]:
        found = {f"{name}:{part}": getattr(layer, part) for name, layer in self.layers.items() for part in _ARRAYS}
        for name, layer in self.layers.items():
            for at, stage in enumerate(layer.stages):
                found |= {f"{name}:{at}:{part}": getattr(stage, part) for part in _BOUNDS}
        return {name: np.ascontiguousarray(array) for name, array in found.items() if array is not None}


def weights_digest(bundle: Bundle, component: Component) -> str:
    """Identity of a component's weights: the hash over the sha256 of its weight files in the bundle.

    Without .safetensors files, as graphs of other exporters come, weights lie in the graph or in a file of any name beside it: then
    all files of the component but texts count.
    """
    folder = component.model.rsplit("/", 1)[0] + "/"
    hashes = {name: f.sha256 for name, f in bundle.files.items() if name.startswith(folder) and not name.endswith((".json", ".txt"))}
    weights = [sha256 for name, sha256 in hashes.items() if name.endswith(".safetensors")]
    return hashlib.sha256("".join(sorted(weights or hashes.values())).encode()).hexdigest()


def _entry(layer: LayerState) -> dict[str, Any]:
    """What a reader wants to see of a layer; all but the clips stands in the vectors too."""
    return {
        "input": {"low": float(layer.input_low.min()), "high": float(layer.input_high.max()), "clip": layer.input_clip},
        "output": {"low": float(layer.output_low.min()), "high": float(layer.output_high.max()), "clip": layer.output_clip},
        "factors": {"low": float(layer.factors.min()), "high": float(layer.factors.max())},
        "weight_amax": float(layer.weight_amax.max()),
        "rounding": "nearest" if layer.codes is None else "codes",
        "stages": [stage.input_clip for stage in layer.stages],
        "rank": 0 if layer.down is None else len(layer.down),
        **({"formats": list(layer.formats)} if any(layer.formats) else {}),
    }


def _layer(name: str, entry: Mapping[str, Any], vectors: Mapping[str, np.ndarray]) -> LayerState:
    parts = {part: vectors.get(f"{name}:{part}") for part in _ARRAYS}
    if missing := [part for part, array in parts.items() if array is None and part not in _OPTIONAL]:
        raise KeyError(f"{name}:{missing[0]}")
    stages = []
    for at, clip in enumerate(entry["stages"]):
        bounds = {part: vectors[f"{name}:{at}:{part}"] for part in _BOUNDS}
        stages.append(Ranges(**bounds, input_clip=float(clip)))
    clips = {"input_clip": entry["input"]["clip"], "output_clip": entry["output"]["clip"]}
    weights, activations = entry.get("formats", ("", ""))
    return LayerState(**parts, **clips, stages=tuple(stages), formats=(weights, activations))  # type: ignore[arg-type]


def _vectors_digest(vectors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(vectors.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ArgumentError(f"There is no quantization state '{path}'", do="Make one with: edgediffusion calibrate") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArgumentError(f"'{file}' is no quantization state: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ArgumentError(
            f"'{path}' is no quantization state of this version", got=f"format {found}", allowed=f"format {FORMAT}", do="Calibrate again."
        )
    return content
