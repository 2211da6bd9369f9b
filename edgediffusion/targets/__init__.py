"""Targets: what a device can run, as data with a source for each fact; a ``.toml`` file of this folder is a target.

``load`` turns a name, or the path of somebody's own file, into a ``Target``; below that no target is a string.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from edgediffusion import registry
from edgediffusion.errors import ArgumentError, UnknownName

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Fact", "Target", "detect", "load", "names"]

_HERE = Path(__file__).parent
_ARCHITECTURES = {"x86_64": "x86-64", "amd64": "x86-64", "aarch64": "arm64", "arm64": "arm64"}
_SYSTEMS = {"Linux": "linux", "Windows": "windows", "Darwin": "macos"}


@dataclass(frozen=True)
class Fact:
    """One thing that is known about a target, and the public page that says so."""

    about: str
    text: str
    source: str


@dataclass(frozen=True)
class Target:
    """A device that engines are built for.

    ``engines`` are names of ``runtimes/engines``, best first; ``formats`` the number formats that run there;
    ``placement`` names where its engine wants Q/DQ nodes; ``opset`` is the newest ONNX opset that it reads.
    """

    name: str
    summary: str
    device: str
    architecture: str
    systems: tuple[str, ...]
    engines: tuple[str, ...]
    formats: tuple[str, ...]
    placement: str
    opset: int
    facts: tuple[Fact, ...] = ()


def names() -> tuple[str, ...]:
    """The targets that this package knows, sorted."""
    return registry.names("targets", ".toml")


def load(name_or_path: str | Path) -> Target:
    """A target by its name, or from a file of one's own whose name ends in ``.toml``.

    Raises:
        UnknownName: there is no such target or file.
        ArgumentError: the file is not TOML, or has unknown, missing or wrong keys.
    """
    name = str(name_or_path)
    file = Path(name) if name.endswith(".toml") else _HERE / f"{name}.toml"
    if not file.is_file() or (name not in names() and not name.endswith(".toml")):
        raise UnknownName("target", name, names(), do="Or give a path ending in .toml.")
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ArgumentError(f"'{file}' is not valid TOML: {error}") from None
    return _target(file, content)


def detect() -> str:
    """The name of the target that this machine is.

    Raises:
        ArgumentError: no known target describes it.
    """
    here = (_ARCHITECTURES.get(platform.machine().lower(), platform.machine()), _SYSTEMS.get(platform.system(), platform.system()))
    for name in names():
        target = load(name)
        if target.device == "cpu" and target.architecture == here[0] and here[1] in target.systems:
            return name
    raise ArgumentError(
        "No known target describes this machine", got=" ".join(here), allowed=", ".join(names()), do="Or give a path ending in .toml."
    )


def _target(file: Path, content: dict[str, Any]) -> Target:
    facts = content.pop("facts", [])
    if not isinstance(facts, list) or not all(isinstance(fact, dict) for fact in facts):
        raise ArgumentError(f"'facts' of '{file}' must be tables, each begun by [[facts]]")
    return Target(
        name=file.stem,
        facts=tuple(Fact(**_checked(file, f"fact {number} of", Fact, fact)) for number, fact in enumerate(facts, 1)),
        **_checked(file, "the target", Target, content),
    )


def _checked(file: Path, what: str, kind: type, content: dict[str, Any]) -> dict[str, Any]:
    """The values of a table, lists made tuples, when it has exactly the keys of ``kind`` with values of their types."""
    types = {f.name: str(f.type) for f in fields(kind) if f.name not in ("name", "facts")}
    for problem, keys in (("has unknown keys", set(content) - set(types)), ("lacks keys", set(types) - set(content))):
        if keys:
            raise ArgumentError(f"{what.capitalize()} '{file}' {problem}", got=", ".join(sorted(keys)), allowed=", ".join(types))
    for key, value in content.items():
        if not _fits(types[key], value):
            raise ArgumentError(f"'{key}' of {what} '{file}' is of the wrong kind", got=repr(value), allowed=types[key])
    return {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}


def _fits(kind: str, value: Any) -> bool:
    if kind == "tuple[str, ...]":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return type(value).__name__ == kind
