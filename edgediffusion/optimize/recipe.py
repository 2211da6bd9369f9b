"""What to quantize and how (a recipe), and where an engine wants the Q/DQ nodes (a placement): data, one TOML file each.

A recipe may name a preset, the layers that a paper or a vendor treats otherwise: a TOML file with ``exclude`` and ``eight``,
to which the recipe's own are added.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from edgediffusion import registry
from edgediffusion.errors import ArgumentError, UnknownName

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_HERE = Path(__file__).parent
FLOAT4 = ("fp4", "e2m1", "e1m2", "e3m0")  # one scale for a channel or a tensor; fp4: of the others the best for each layer
BITS = {"int8": 8, "int4": 4, "fp8": 8, "nvfp4": 4, **dict.fromkeys(FLOAT4, 4)}
DYNAMIC = ("", "tensor", "token")
RANGES = ("max", "mse", "step-mean", "modelopt-max", "modelopt-mse")
RECONSTRUCT = ("network", "block")
TEMPORAL = ("", "tiar")
LARGEST_RANK = 256
MOST_STAGES = 8
GROUPS = (0, 16, 32, 64, 128, 256)  # block sizes that engines' kernels for 4-bit weights have
_FORMATS = (*BITS, "float")


@dataclass(frozen=True)
class Recipe:
    """Number formats, the methods that calibration finds their parameters with, and the layers that are treated otherwise.

    ``exclude``, ``eight``, ``split`` and ``rotate`` are regular expressions for module paths: layers that stay float, layers that
    get int8 weights and activations whatever the others get, convolutions that become one for each part of what they read,
    where that is a concatenation, and linear layers that read a Hadamard rotation of their input. ``balance`` and ``rounding``
    name files of those folders; ``ranges`` is ``max``, the observed ones, ``mse``, those with the least squared error, ``step-mean``,
    inputs up to the mean of the steps' largest values, or what nvidia-modelopt's algorithms find. ``activations = "float"``
    quantizes weights only; then ``group`` may give linear layers' weights a scale for every so many input channels (0: one for
    all). ``rank`` gives linear layers of few bits a float branch of that rank. Activations have ranges of their own in each of
    ``stages`` runs of sampling steps, and there is a graph for each. ``fp8`` is E4M3; ``nvfp4`` and the formats of ``FLOAT4`` are in
    float4.py. ``dynamic`` finds the ranges of matrix products' inputs at run time, for a whole ``tensor`` or for each ``token``; the
    latter with ``group`` for every so many channels of it. ``effective_bits`` lets nvidia-modelopt choose which layers have the
    recipe's format, 8 bits, or stay float, so that a weight has so many bits on average (0: none is chosen). ``reconstruct`` is what
    rounding that learns is fitted to: the output of the whole ``network``, or of each ``block`` in turn. ``temporal = "tiar"`` fits the
    rounding of the time embedding's layers to what they give at the sampler's steps. ``float_last`` is how many of the last sampling
    steps the float network computes.
    """

    name: str
    weights: str
    activations: str
    balance: str = "search"
    ranges: str = "max"
    rounding: str = "nearest"
    group: int = 0
    rank: int = 0
    stages: int = 1
    dynamic: str = ""
    effective_bits: float = 0.0
    reconstruct: str = "network"
    temporal: str = ""
    float_last: int = 0
    exclude: tuple[str, ...] = ()
    eight: tuple[str, ...] = ()
    split: tuple[str, ...] = ()
    rotate: tuple[str, ...] = ()
    preset: str = ""

    def splits(self, layer: str) -> bool:
        return self.excludes(layer) is None and any(re.search(e, layer) for e in self.split)

    def rotates(self, layer: str) -> bool:
        return self.excludes(layer) is None and any(re.search(e, layer) for e in self.rotate)

    def excludes(self, layer: str) -> str | None:
        """The first expression that keeps ``layer`` float, or None."""
        return next((e for e in self.exclude if re.search(e, layer)), None)

    def formats(self, layer: str) -> tuple[str, str]:
        """Formats of the layer's weights and activations, if it is not excluded."""
        if any(re.search(e, layer) for e in self.eight):
            return "int8", "float" if self.activations == "float" else "int8"
        return self.weights, self.activations

    def bits(self, layer: str) -> tuple[int, int]:
        """As ``formats``, in bits; 16 for float."""
        weights, activations = (BITS.get(f, 16) for f in self.formats(layer))
        return weights, activations

    def groups(self, shape: Sequence[int]) -> int:
        """How many scales an output channel has in a weight of this shape: one, but for linear layers of whole groups."""
        return shape[1] // self.group if self.group and len(shape) == 2 and shape[1] % self.group == 0 else 1

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Placement:
    """Where an engine wants Q/DQ nodes.

    ``activations`` is the format of 8-bit activations, ``uint8`` with a zero point or ``int8`` without; ``inputs`` and
    ``outputs`` are the operators with Q/DQ there. With ``channel_scales``, unsigned outputs have a scale
    for each channel: Q has 1 and DQ a vector, which the engine must not mind. ``int4`` is what codes of 4-bit weights are stored as
    where activations are integers too: ``int4``, or ``int8`` where the engine's kernels take no other. ``formats`` are those of
    weights and activations that the engine has kernels for, ``dynamic`` the recipes' ways to find ranges at run time. A placement
    that ``simulates`` has operators on float numbers in place of kernels for the floating formats.
    """

    name: str
    activations: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...] = ()
    channel_scales: bool = False
    int4: str = "int4"
    formats: tuple[str, ...] = ("int8", "int4")
    dynamic: tuple[str, ...] = ()
    simulates: bool = False


def load_recipe(name: str | Recipe) -> Recipe:
    """A recipe by name, or by the path of a TOML file (UnknownName, ArgumentError)."""
    if isinstance(name, Recipe):
        return name
    recipe = _check(_load(Recipe, "recipes", name), weights=tuple(BITS), activations=_FORMATS, ranges=RANGES, group=GROUPS)
    _check(recipe, dynamic=DYNAMIC, reconstruct=RECONSTRUCT, temporal=TEMPORAL)
    _check_together(recipe)
    _check_dynamic(recipe)
    _check_floats(recipe)
    _check_modelopt(recipe)
    if recipe.reconstruct == "block":
        _check_fields(recipe, "a reconstruction of blocks, which is a way to learn", {"rounding": ("adaround", "straight-through")})
    if recipe.preset:
        recipe = with_preset(recipe, recipe.preset)
    for folder in ("balance", "rounding"):
        known = registry.names(f"optimize.{folder}")
        if getattr(recipe, folder) not in known:
            raise UnknownName(f"{folder} method", getattr(recipe, folder), known)
    for expression in (*recipe.exclude, *recipe.eight, *recipe.split, *recipe.rotate):
        try:
            re.compile(expression)
        except re.error as error:
            raise ArgumentError(f"'{name}' has an expression that is not valid: {error}", got=repr(expression)) from None
    return recipe


def _check_together(recipe: Recipe) -> None:
    if recipe.group and recipe.activations != "float" and recipe.dynamic != "token":
        raise ArgumentError(
            f"'{recipe.name}' asks for scales by group of input channels beside quantized activations: integer kernels sum over them",
            got=f"group = {recipe.group}, activations = {recipe.activations!r}",
            do='Leave out group, or set activations = "float" or dynamic = "token".',
        )
    if not (isinstance(recipe.rank, int) and 0 <= recipe.rank <= LARGEST_RANK):
        raise ArgumentError(f"'{recipe.name}' asks for a rank that is none", got=repr(recipe.rank), allowed=f"0..{LARGEST_RANK}")
    if not (isinstance(recipe.stages, int) and 1 <= recipe.stages <= MOST_STAGES):
        raise ArgumentError(
            f"'{recipe.name}' asks for a number of stages that is none", got=repr(recipe.stages), allowed=f"1..{MOST_STAGES}"
        )
    if not (type(recipe.float_last) is int and 0 <= recipe.float_last <= MOST_STAGES):
        raise ArgumentError(
            f"'{recipe.name}' asks for a number of float steps that is none", got=repr(recipe.float_last), allowed=f"0..{MOST_STAGES}"
        )
    if recipe.stages > 1 and (recipe.rounding not in ("nearest", "gptq") or recipe.ranges.startswith("modelopt")):
        raise ArgumentError(
            f"'{recipe.name}' asks for stages beside methods that find one range for all steps",
            got=f"rounding = {recipe.rounding!r}, ranges = {recipe.ranges!r}",
            allowed="rounding 'nearest' or 'gptq', ranges 'max', 'mse' or 'step-mean'",
        )
    if recipe.rank and recipe.ranges.startswith("modelopt"):
        raise ArgumentError(
            f"'{recipe.name}' asks for a branch of low rank, and for ModelOpt's ranges of the weights without it",
            got=f"rank = {recipe.rank}, ranges = {recipe.ranges!r}",
            do='Leave out rank, or set ranges = "mse".',
        )


def _check_dynamic(recipe: Recipe) -> None:
    if not recipe.dynamic:
        return
    allowed: dict[str, tuple[object, ...]] = {
        "weights": ("int8", "int4"),
        "activations": ("int8", "int4") if recipe.dynamic == "token" else ("int8",),
        "rounding": ("nearest", "gptq"),
        "ranges": ("max", "mse"),
        "stages": (1,),
        "rank": (0,),
        "temporal": ("",),
    }
    _check_fields(recipe, "ranges that are found at run time", allowed)


def _check_floats(recipe: Recipe) -> None:
    used = {recipe.weights, recipe.activations} - {"float"}
    if not used & {"fp8", "nvfp4", *FLOAT4}:
        return
    allowed: dict[str, tuple[object, ...]] = {"ranges": ("max",), "rounding": ("nearest",), "temporal": ("",), "effective_bits": (0,)}
    if "fp8" not in used:  # four bits
        family = ("nvfp4",) if "nvfp4" in used else FLOAT4
        allowed |= {"weights": family, "activations": (*family, "float"), "group": (0,)}
        allowed |= {"ranges": ("max",)} if "nvfp4" in used else {"ranges": ("max", "mse"), "stages": (1,), "rank": (0,)}
    _check_fields(recipe, f"{' and '.join(sorted(used))} beside what is for integers or for other formats", allowed)


def _check_modelopt(recipe: Recipe) -> None:
    if recipe.balance == "modelopt-smoothquant":
        _check_fields(recipe, "ModelOpt's SmoothQuant, which is for int8 alone", {"weights": ("int8",), "activations": ("int8",)})
    if recipe.balance.startswith("modelopt"):
        _check_fields(recipe, "ModelOpt's balance, of integers", {"weights": ("int8", "int4"), "activations": ("int8", "int4", "float")})
    if recipe.balance == "modelopt-svdquant" and (not recipe.rank or BITS[recipe.weights] == 8):
        raise ArgumentError(
            f"'{recipe.name}' asks for ModelOpt's SVDQuant, which is a branch of low rank beside weights of few bits",
            got=f"rank = {recipe.rank}, weights = {recipe.weights!r}",
            do='Set rank = 32 and weights = "int4", or balance = "modelopt-awq".',
        )
    bits, least = recipe.effective_bits, BITS[recipe.weights]
    if bits and not (isinstance(bits, (int, float)) and not isinstance(bits, bool) and least <= bits <= 16):
        raise ArgumentError(f"'{recipe.name}' asks for a mean of bits that cannot be", got=repr(bits), allowed=f"0, or {least}..16")
    if bits:
        _check_fields(recipe, "a choice of formats by ModelOpt, of integers", {"weights": ("int8", "int4")})


def _check_fields(recipe: Recipe, what: str, allowed: Mapping[str, tuple[object, ...]]) -> None:
    differing = {field: getattr(recipe, field) for field, values in allowed.items() if getattr(recipe, field) not in values}
    if differing:
        raise ArgumentError(
            f"'{recipe.name}' asks for {what}",
            got=", ".join(f"{field} = {value!r}" for field, value in differing.items()),
            allowed="; ".join(f"{field} {', '.join(map(repr, allowed[field]))}" for field in differing),
        )


def with_preset(recipe: Recipe, name: str) -> Recipe:
    """The recipe with the layers of a preset added to its own (UnknownName)."""
    preset = _load(_Preset, "presets", name)
    return replace(recipe, preset=name, exclude=(*preset.exclude, *recipe.exclude), eight=(*preset.eight, *recipe.eight))


def recipe_of(stated: Mapping[str, Any]) -> Recipe:
    """The recipe that a quantization state was made for."""
    fields_of: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stated.items()}
    return Recipe(**fields_of)


def load_placement(name: str | Placement) -> Placement:
    """A placement by name, or by the path of a TOML file (UnknownName, ArgumentError)."""
    if isinstance(name, Placement):
        return name
    return _check(_load(Placement, "placements", name), activations=("uint8", "int8"), int4=("int4", "int8"))


@dataclass(frozen=True)
class _Preset:
    name: str
    exclude: tuple[str, ...] = ()
    eight: tuple[str, ...] = ()


_Record = TypeVar("_Record", Recipe, Placement, _Preset)


def _load(kind: type[_Record], folder: str, name: str) -> _Record:
    file = Path(name) if name.endswith(".toml") else _HERE / folder / f"{name.replace('-', '_')}.toml"
    known = registry.names(f"optimize.{folder}", ".toml")
    if not file.is_file():
        raise UnknownName(folder.removesuffix("s"), name, known, do=f"Or give the path of a {folder.removesuffix('s')} that ends in .toml.")
    try:
        content: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ArgumentError(f"'{file}' is not valid TOML: {error}") from None
    allowed = {f.name for f in fields(kind)} - {"name"}
    if unknown := set(content) - allowed:
        raise ArgumentError(f"'{name}' has unknown keys", got=", ".join(sorted(unknown)), allowed=", ".join(sorted(allowed)))
    for key in (f.name for f in fields(kind) if f.type == "tuple[str, ...]" and f.name in content):
        if not (isinstance(content[key], list) and all(isinstance(entry, str) for entry in content[key])):
            raise ArgumentError(f"'{name}' has no list of texts for {key}", got=repr(content[key]), allowed=f'{key} = ["...", "..."]')
    try:
        record: Any = kind
        return record(name=file.stem.replace("_", "-"), **{k: tuple(v) if isinstance(v, list) else v for k, v in content.items()})  # type: ignore[no-any-return]
    except TypeError as error:
        raise ArgumentError(f"'{name}' lacks a key: {error}", allowed=", ".join(sorted(allowed))) from None


_Checked = TypeVar("_Checked", Recipe, Placement)


def _check(record: _Checked, **allowed: tuple[object, ...]) -> _Checked:
    for field, values in allowed.items():
        if getattr(record, field) not in values:
            raise ArgumentError(
                f"'{record.name}' asks for {field} that this version cannot write",
                got=getattr(record, field),
                allowed=", ".join(map(str, values)),
            )
    return record
