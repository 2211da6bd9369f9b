"""What to quantize (a recipe) and where an engine wants the Q/DQ nodes (a placement): plain data, one TOML file each."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from edgediffusion import registry
from edgediffusion.errors import ArgumentError, UnknownName

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """Number formats, and regular expressions for the module paths of layers that stay float."""

    name: str
    weights: str
    activations: str
    exclude: tuple[str, ...] = ()

    def excludes(self, layer: str) -> str | None:
        """The first expression that keeps ``layer`` float, or None."""
        return next((e for e in self.exclude if re.search(e, layer)), None)


@dataclass(frozen=True)
class Placement:
    """Activation format of an engine, and the operators that take Q/DQ on their inputs and on their outputs."""

    name: str
    activations: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...] = ()


def load_recipe(name: str) -> Recipe:
    """A recipe by name, or by the path of a TOML file (UnknownName, ArgumentError)."""
    return _check(_load(Recipe, "recipes", name), weights=("int8",), activations=("int8",))


def load_placement(name: str) -> Placement:
    return _check(_load(Placement, "placements", name), activations=("uint8", "int8"))


_Record = TypeVar("_Record", Recipe, Placement)


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
    try:
        record: Any = kind
        return record(name=file.stem.replace("_", "-"), **{k: tuple(v) if isinstance(v, list) else v for k, v in content.items()})  # type: ignore[no-any-return]
    except TypeError as error:
        raise ArgumentError(f"'{name}' lacks a key: {error}", allowed=", ".join(sorted(allowed))) from None


def _check(record: _Record, **allowed: tuple[str, ...]) -> _Record:
    for field, values in allowed.items():
        if getattr(record, field) not in values:
            raise ArgumentError(
                f"'{record.name}' asks for {field} that this version cannot write", got=getattr(record, field), allowed=", ".join(values)
            )
    return record
