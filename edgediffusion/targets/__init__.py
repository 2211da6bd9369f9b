"""Targets: what a device can run, as data with a source for each fact; a ``.toml`` file of this folder is a target.

``load`` turns a name, or the path of somebody's own file, into a ``Target``; below that no target is a string. docs/targets.md
has the keys of a file.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from edgediffusion import registry
from edgediffusion.errors import ArgumentError, UnknownName
from edgediffusion.targets._machine import Device, Machine, cuda_devices, this_machine

__all__ = [
    "AUTO",
    "DEVICES",
    "FORMATS",
    "SOURCED",
    "Device",
    "Fact",
    "Machine",
    "Target",
    "cuda_devices",
    "detect",
    "in_range",
    "load",
    "names",
    "this_machine",
]

AUTO = "auto"  # in place of a name: the target that this machine is
DEVICES = ("cpu", "gpu", "npu")
FORMATS = ("float32", "tf32", "float16", "bfloat16", "fp8", "int8", "fp4", "int4")
SOURCED = ("libraries", "compute_capability", "memory_gb", "bandwidth_gb_s", "peak_tops", "per_cycle", "power_modes_w", "dla_cores")
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Fact:
    """One thing that is known about a target, and the public page that says so."""

    about: str
    text: str
    source: str


@dataclass(frozen=True)
class Target:
    """A device that engines are built for.

    ``engines`` are names of ``runtimes/engines``, best first, ``libraries`` the versions that each of them may have; ``formats``
    the number formats that have kernels there; ``placement`` names where its engine wants Q/DQ nodes; ``opset`` is the newest
    ONNX opset that it reads; ``ahead`` says whether its engines can be built on a machine that has no such device.

    ``memory_gb`` is shared with the processor where ``shared_memory`` is true; ``bandwidth_gb_s`` in 10^9 bytes a second;
    ``peak_tops`` in 10^12 operations a second by format, dense, a multiplication and an addition being two; ``per_cycle``, for
    processors, operations of one core in one cycle by instruction set and format; ``power_modes_w`` the limits one can choose.
    ``known_as`` are expressions for the whole name by which a machine calls this device.

    ``sources`` has a public page for each of the names in ``SOURCED`` (or ``peak_tops.int8``, for one entry) that is given and is
    not among ``unverified``.
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
    ahead: bool = False
    libraries: Mapping[str, str] = field(default_factory=dict)
    compute_capability: str = ""
    memory_gb: float = 0.0
    shared_memory: bool = False
    bandwidth_gb_s: float = 0.0
    peak_tops: Mapping[str, float] = field(default_factory=dict)
    per_cycle: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    power_modes_w: tuple[float, ...] = ()
    dla_cores: int = 0
    known_as: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    unverified: tuple[str, ...] = ()
    facts: tuple[Fact, ...] = ()


def names() -> tuple[str, ...]:
    """The targets that this package knows, sorted."""
    return registry.names("targets", ".toml")


def load(name_or_path: str | Path) -> Target:
    """A target by its name, from a file of one's own whose name ends in ``.toml``, or for ``auto`` the one that this machine is.

    Raises:
        UnknownName: there is no such target or file.
        ArgumentError: the file is not TOML, or has unknown, missing or wrong keys; no target describes this machine.
    """
    # Not at the top: a device that builds from a kit has its target's facts already, and Python 3.10 has no parser of TOML.
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    name = detect() if str(name_or_path) == AUTO else str(name_or_path)
    file = Path(name) if name.endswith(".toml") else _HERE / f"{name}.toml"
    if not file.is_file() or (name not in names() and not name.endswith(".toml")):
        raise UnknownName("target", name, names(), do=f"Or give a path ending in .toml, or '{AUTO}' for this machine.")
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ArgumentError(f"'{file}' is not valid TOML: {error}") from None
    return _target(file, content)


def detect(machine: Machine | None = None) -> str:
    """The name of the target that a machine is, by default this one: its accelerator, or its processor where it has none.

    Of the targets that have the same names for a device, the one whose memory is nearest is taken: AGX Orin comes with 32 and 64 GB.

    Raises:
        ArgumentError: no known target describes it.
    """
    machine = machine or this_machine()
    targets = [t for t in map(load, names()) if t.architecture == machine.architecture and machine.system in t.systems]
    for device in machine.devices:
        found = [t for t in targets if any(device.is_called(name) for name in t.known_as)]
        if found:
            return min(found, key=lambda t: abs(t.memory_gb - device.memory_gb) if device.memory_gb else 0.0).name
    processors = [t for t in targets if t.device == "cpu" and not t.known_as]
    if processors and not machine.devices:
        return min(processors, key=lambda t: (t.engines[0] != "onnxruntime", t.name)).name
    raise ArgumentError(
        "No known target describes this machine",
        got=" ".join((machine.architecture, machine.system, *(device.name for device in machine.devices))),
        allowed=", ".join(names()),
        do="Name one that is near, or give a path ending in .toml: docs/targets.md has the keys of such a file.",
    )


def in_range(version: str, wanted: str) -> bool:
    """Whether a version meets ``>=2.13,<2.14``: comparisons of release numbers, with commas between; "" is met by any."""
    for condition in filter(None, (part.strip() for part in wanted.split(","))):
        match = re.fullmatch(r"(>=|<=|==|!=|<|>)\s*([\d.]+)", condition)
        if match is None:
            return False
        left, right = _release(version), _release(match[2])
        order = (left > right) - (left < right)
        if order not in {">=": (0, 1), "<=": (-1, 0), "==": (0,), "!=": (-1, 1), "<": (-1,), ">": (1,)}[match[1]]:
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    release = [int(n) for n in numbers[0].split(".")] if numbers else [0]
    while len(release) > 1 and release[-1] == 0:
        release.pop()
    return tuple(release)


def _target(file: Path, content: dict[str, Any]) -> Target:
    facts = content.pop("facts", [])
    if not isinstance(facts, list) or not all(isinstance(fact, dict) for fact in facts):
        raise ArgumentError(f"'facts' of '{file}' must be tables, each begun by [[facts]]")
    target = Target(
        name=file.stem,
        facts=tuple(Fact(**_checked(file, f"fact {number} of", Fact, fact)) for number, fact in enumerate(facts, 1)),
        **_checked(file, "the target", Target, content),
    )
    _check_words(file, target)
    _check_sources(file, target)
    return target


def _check_words(file: Path, target: Target) -> None:
    """Refuse words that nothing here knows: a format or a device that is spelt otherwise would never be found."""
    tables = {"formats": target.formats, "peak_tops": target.peak_tops, "per_cycle": {f for t in target.per_cycle.values() for f in t}}
    for key, found, allowed in (
        ("device", {target.device}, DEVICES),
        *((key, set(found), FORMATS) for key, found in tables.items()),
        ("libraries", set(target.libraries), target.engines),
        ("sources", {name.partition(".")[0] for name in target.sources}, SOURCED),
        ("unverified", {name.partition(".")[0] for name in target.unverified}, SOURCED),
    ):
        if unknown := sorted(found - set(allowed)):
            raise ArgumentError(f"'{key}' of the target '{file}' has what is not known", got=", ".join(unknown), allowed=", ".join(allowed))
    for key in ("engines", "formats", "systems"):
        if not getattr(target, key):
            raise ArgumentError(f"'{key}' of the target '{file}' is empty", do="Name at least one.")


def _check_sources(file: Path, target: Target) -> None:
    """Each fact, or each entry of it, has a page or is owned to be unverified; and no page is for what the file does not say."""
    told = {*target.sources, *target.unverified}
    given = [key for key in SOURCED if getattr(target, key)]
    parts = {key: [f"{key}.{part}" for part in value] if isinstance(value := getattr(target, key), Mapping) else [] for key in given}
    if idle := told - {*given, *(part for entries in parts.values() for part in entries)}:
        raise ArgumentError(f"The target '{file}' has sources of facts that it does not state", got=", ".join(sorted(idle)))
    lacking = [key for key in given if key not in told and not (parts[key] and set(parts[key]) <= told)]
    if lacking:
        raise ArgumentError(
            f"The target '{file}' has facts without a source",
            got=", ".join(lacking),
            do="Give the page that says so under [sources], or name what no page says in 'unverified'.",
        )
    if wrong := [url for url in target.sources.values() if not url.startswith("https://")]:
        raise ArgumentError(f"'sources' of the target '{file}' has what is no web page", got=", ".join(wrong), allowed="https://...")


def _checked(file: Path, what: str, kind: type, content: dict[str, Any]) -> dict[str, Any]:
    """The values of a table, lists made tuples, when it has the keys of ``kind`` with values of their types."""
    known = {f.name: f for f in fields(kind) if f.name not in ("name", "facts")}
    needed = {name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
    for problem, keys in (("has unknown keys", set(content) - set(known)), ("lacks keys", needed - set(content))):
        if keys:
            raise ArgumentError(f"{what.capitalize()} '{file}' {problem}", got=", ".join(sorted(keys)), allowed=", ".join(known))
    for key, value in content.items():
        if not _fits(str(known[key].type), value):
            raise ArgumentError(f"'{key}' of {what} '{file}' is of the wrong kind", got=repr(value), allowed=_TYPES[str(known[key].type)])
    return {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}


_TYPES = {
    "str": "a text",
    "int": "a whole number that is not negative",
    "bool": "true or false",
    "float": "a number that is not negative",
    "tuple[str, ...]": "a list of texts",
    "tuple[float, ...]": "a list of numbers",
    "Mapping[str, str]": "a table of texts",
    "Mapping[str, float]": "a table of numbers",
    "Mapping[str, Mapping[str, float]]": "tables of numbers",
}


def _fits(kind: str, value: Any) -> bool:
    if kind.startswith("tuple["):
        return isinstance(value, list) and all(_fits(kind[6:].partition(",")[0], item) for item in value)
    if kind.startswith("Mapping[str, "):
        return isinstance(value, dict) and all(_fits(kind[13:-1], item) for item in value.values())
    if kind in ("float", "int"):
        return type(value) in ((int, float) if kind == "float" else (int,)) and 0 <= value < float("inf")
    return type(value).__name__ == kind
