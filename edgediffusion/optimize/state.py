"""The quantization state: every range that calibration found, in one readable file, apart from any engine.

Keys are ``component/module path`` as the checkpoint names its modules, so one state serves every graph and every
target made of the same weights. The file is JSON with sorted keys: two states can be compared with ``diff``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgediffusion.bundle import Bundle, Component
from edgediffusion.errors import ArgumentError, BundleError
from edgediffusion.files import dump_json, new_file

FORMAT = 1


@dataclass(frozen=True)
class TensorRange:
    """Lowest and highest value that a tensor took, and the bound of a symmetric quantizer for it (amax)."""

    low: float
    high: float
    amax: float


@dataclass(frozen=True)
class LayerRanges:
    """Ranges of one layer: its input, its output, and amax of its weight for each output channel."""

    input: TensorRange
    output: TensorRange
    weight_amax: tuple[float, ...]


@dataclass(frozen=True)
class QuantizationState:
    """``weights`` says which weights the ranges belong to (see ``weights_digest``), ``calibration`` how they were found."""

    weights: str
    calibration: Mapping[str, Any]
    layers: Mapping[str, LayerRanges]
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        return hashlib.sha256(dump_json(_to_json(self)).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write the file; an existing one is refused (OutputError)."""
        with new_file(path) as partial:
            partial.write_text(dump_json(_to_json(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> QuantizationState:
        """Read a state file.

        Raises:
            ArgumentError: there is no such file, it is no state, or a newer format.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ArgumentError(f"There is no quantization state '{path}'", do="Make one with: edgediffusion calibrate") from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ArgumentError(f"'{path}' is no quantization state: {error}") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise ArgumentError(f"'{path}' is no quantization state of this version", got=f"format {found}", allowed=f"format {FORMAT}")
        try:
            layers = {name: _layer(entry) for name, entry in content["layers"].items()}
            return cls(content["weights"], content["calibration"], layers, content["versions"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ArgumentError(f"The quantization state '{path}' lacks or misstates a field: {error}") from None


def weights_digest(bundle: Bundle, component: Component) -> str:
    """Identity of a component's weights: the hash over the sha256 of its weight files in the bundle."""
    folder = component.model.rsplit("/", 1)[0] + "/"
    hashes = sorted(f.sha256 for name, f in bundle.files.items() if name.startswith(folder) and name.endswith(".safetensors"))
    if not hashes:
        raise BundleError(f"The component '{component.name}' has no .safetensors weights in its folder")
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _to_json(state: QuantizationState) -> dict[str, Any]:
    return {"format": FORMAT, **asdict(state)}


def _layer(entry: Mapping[str, Any]) -> LayerRanges:
    return LayerRanges(TensorRange(**entry["input"]), TensorRange(**entry["output"]), tuple(entry["weight_amax"]))
