"""LoRA files: changes of low rank that are added to a network's weights when it is exported.

    W' = W + scale * alpha / rank * up @ down        (Hu et al. 2021, 2106.09685, section 4.1)

``down`` is [rank, in], ``up`` [out, rank]; of a convolution [rank, in, h, w] and [out, rank, 1, 1]. alpha is the rank unless the
file says otherwise. ``lora_names`` knows how files call the modules.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgediffusion.bundle import Bundle
from edgediffusion.errors import ArgumentError, SourceError
from edgediffusion.export.checkpoint import Stored, read_header, refuse_pickle
from edgediffusion.export.lora_names import family_told, modules_of, place

_KEY = re.compile(r"^(?P<module>.+?)[._]lora[._](?:linear_layer\.)?(?P<half>A|B|down|up)(?:\.default(?:_\d+)?)?\.weight$")
_ALPHA = ".alpha"
_NOTES = "lora_adapter_metadata"  # diffusers' own: the configuration of PEFT, with the component's name before each key
# Other ways to write a change, which none of the formulas above is.
_OTHERS = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "lora_mid": "a LoRA with a middle product",
    ".diff": "whole differences",
    ".set_weight": "whole weights",
    "lora_B.bias": "a LoRA with biases",
}
_SHOWN = 5
_DO = "Take a LoRA that was trained for this pipeline."
_ELEMENTS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


@dataclass(frozen=True)
class LowRank:
    """A change of a weight: rows ``first_row`` to ``first_row + rows`` of ``scale * up @ down`` are added to the weight's rows."""

    down: Stored
    up: Stored
    scale: float
    first_row: int
    rows: int

    def read(self) -> Callable[[np.ndarray, int], None]:
        """``add(values, first)``: change float32 [rows, columns], the weight's rows from ``first`` on, in place."""
        rank = self.down.shape[0]
        down = read_values(self.down).reshape(rank, -1)
        up = read_values(self.up).reshape(-1, rank)[self.first_row : self.first_row + self.rows] * np.float32(self.scale)

        def add(values: np.ndarray, first: int) -> None:
            values += up[first : first + len(values)] @ down

        return add


@dataclass(frozen=True)
class Pair:
    """The two halves of one change, and what ``up @ down`` is multiplied by."""

    down: Stored
    up: Stored
    scale: float


@dataclass(frozen=True)
class Lora:
    """One file and the scale that it is asked for with; ``pairs`` by the file's own names of modules."""

    file: Path
    scale: float
    pairs: Mapping[str, Pair]

    @classmethod
    def open(cls, file: Path, scale: float) -> Lora:
        """Raises SourceError: no such file, a pickle, damaged, or something that is no LoRA; the message says what."""
        if not math.isfinite(scale):
            raise ArgumentError("The scale of a LoRA is not a finite number", got=f"{file.name}:{scale}")
        if not file.is_file():
            raise SourceError(f"There is no file '{file}'", do="Give the .safetensors file of a LoRA.")
        refuse_pickle(file)
        tensors, notes = read_header(file)
        found = {key: match for key in tensors if (match := _KEY.match(key)) is not None}
        _refuse_others(file, sorted(key for key in tensors if key not in found and not key.endswith(_ALPHA)), bool(found))
        halves: dict[str, dict[str, Stored]] = {}
        for key, match in found.items():
            name = match["module"].replace(".processor.", ".")
            name += ".0" if name.endswith(".to_out") else ""  # an attention processor's own name of it
            halves.setdefault(name, {})["down" if match["half"] in ("A", "down") else "up"] = tensors[key]
        alphas = {
            key.removesuffix(_ALPHA): float(read_values(stored).ravel()[0]) for key, stored in tensors.items() if key.endswith(_ALPHA)
        }
        alphas = {name.replace(".processor.", "."): alpha for name, alpha in alphas.items()}
        lone = sorted(name for name, two in halves.items() if len(two) < 2) + sorted(set(alphas) - set(halves))
        if lone:
            raise _unfit(file, "lacks a half of some of its changes", lone)
        configuration = _configuration(file, notes)
        return cls(file, scale, {n: _pair(file, n, two, alphas.get(n), configuration) for n, two in halves.items()})


def fused(loras: Sequence[Lora], networks: Mapping[str, Mapping[str, Sequence[int]]], denoiser: str) -> dict[str, dict[str, list[LowRank]]]:
    """Which weights of which network change how: networks by component name, with the shapes of their weights.

    Raises:
        SourceError: a LoRA has keys that fit no module, or of another shape; the message lists them.
    """
    targets = {name: modules_of(shapes) for name, shapes in networks.items()}
    changes: dict[str, dict[str, list[LowRank]]] = {}
    for lora in loras:
        lost, misshapen = [], []
        for name, pair in lora.pairs.items():
            component, modules = place(name, targets, denoiser)
            weights = [f"{module}.weight" for module in modules]
            shapes = [tuple(networks[component][weight]) for weight in weights]
            if not modules:
                lost.append(name)
            elif wrong := _misfit(pair, shapes):
                misshapen.append(f"{name} ({wrong})")
            else:
                first = 0
                for weight, shape in zip(weights, shapes, strict=True):
                    change = LowRank(pair.down, pair.up, pair.scale * lora.scale, first, shape[0])
                    changes.setdefault(component, {}).setdefault(weight, []).append(change)
                    first += shape[0]
        if lost or misshapen:
            family = family_told(lora.pairs, {name: pair.down.shape for name, pair in lora.pairs.items()})
            what = "has keys that fit no module" if lost else "has matrices that fit no weight"
            made_for = f": it was made for {family}" if family else ""
            raise _unfit(lora.file, f"{what} of this pipeline ({', '.join(networks)}){made_for}", lost or misshapen, do=_DO)
    return changes


def identity(source: str, loras: Sequence[tuple[str, float]]) -> str:
    """Of the weights that a bundle is made of: the source's own digest, or one of it and the LoRAs, by their sha256 and scales."""
    if not loras:
        return source
    return hashlib.sha256("\n".join([source, *(f"{digest} {scale!r}" for digest, scale in loras)]).encode()).hexdigest()


def refuse_fused(bundle: Bundle) -> None:
    """Refuse to compare a bundle with its source where LoRAs were fused into it: the source has other weights.

    Raises:
        ArgumentError: the bundle was exported with LoRAs.
    """
    loras = bundle.history[0].arguments.get("loras", ()) if bundle.history else ()
    if loras:
        raise ArgumentError(
            f"The bundle '{bundle.path}' has LoRAs fused into its weights, which its source does not have",
            got=", ".join(lora["file"] for lora in loras),
            do="Calibrate it without --source; or fuse them in diffusers (fuse_lora, save_pretrained), and export that folder.",
        )


def read_values(stored: Stored) -> np.ndarray:
    """A tensor of a LoRA as float32."""
    with open(stored.file, "rb") as stream:
        stream.seek(stored.offset)
        content = stream.read(stored.bytes)
    if stored.dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(stored.shape)
    if stored.dtype not in _ELEMENTS:
        raise SourceError(f"The LoRA '{stored.file.name}' has matrices of whole numbers", got=stored.dtype, allowed="F32, F16, BF16")
    return np.asarray(np.frombuffer(content, _ELEMENTS[stored.dtype]), np.float32).reshape(stored.shape)


def _misfit(pair: Pair, shapes: Sequence[tuple[int, ...]]) -> str:
    """What is wrong with the halves for weights of these shapes, stacked; nothing if they fit."""
    rows, columns = sum(shape[0] for shape in shapes), {math.prod(shape[1:]) for shape in shapes}
    found = (math.prod(pair.up.shape) // pair.up.shape[1], math.prod(pair.down.shape[1:]))
    return "" if (rows, columns) == (found[0], {found[1]}) else f"{found[0]} x {found[1]}, not {rows} x {min(columns)}"


def _pair(file: Path, name: str, halves: Mapping[str, Stored], alpha: float | None, configuration: Mapping[str, Any]) -> Pair:
    down, up = halves["down"], halves["up"]
    if len(up.shape) < 2 or up.shape[1] != down.shape[0] or math.prod(up.shape[2:]) != 1 or down.shape[0] == 0:
        raise _unfit(file, "has halves that do not belong together", [f"{name} {up.shape} and {down.shape}"])
    rank = down.shape[0]
    component = next((c for c in sorted({key.split(".")[0] for key in configuration}) if name.startswith(f"{c}.")), "")
    own = {key.removeprefix(f"{component}."): value for key, value in configuration.items() if key.startswith(f"{component}.")}
    if alpha is None and own:
        patterns = own.get("alpha_pattern") or {}
        chosen = [value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)]
        alpha = float(chosen[0] if chosen else own.get("lora_alpha") or rank)
    divisor = math.sqrt(rank) if own.get("use_rslora") else rank  # Kalajdzievski 2023, 2312.03732
    return Pair(down, up, (rank if alpha is None else alpha) / divisor)


def _configuration(file: Path, notes: Mapping[str, str]) -> dict[str, Any]:
    try:
        content = json.loads(notes.get(_NOTES, "{}"))
    except ValueError:
        raise SourceError(f"The LoRA '{file.name}' has a damaged note '{_NOTES}'", do="Save it again.") from None
    return content if isinstance(content, dict) else {}


def _refuse_others(file: Path, keys: Sequence[str], is_lora: bool) -> None:
    if not keys and is_lora:
        return
    kind = next((kind for part, kind in _OTHERS.items() if any(part in key for key in keys)), "")
    if kind:
        raise _unfit(file, f"is {kind}, which cannot be fused here", keys, do="Merge it with the tool that made it, and export the result.")
    raise _unfit(file, "has keys that are not known" if is_lora else "is no LoRA", keys, do=_DO)


def _unfit(file: Path, wrong: str, keys: Sequence[str], *, do: str = "Save it again, or take another.") -> SourceError:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return SourceError(
        f"The LoRA '{file.name}' {wrong}",
        got=", ".join(keys[:_SHOWN]) + more if keys else "no tensors",
        allowed="changes of low rank as diffusers, PEFT and kohya's scripts save them: lora_A and lora_B, or lora_down, lora_up and alpha",
        do=do,
    )
