"""``engines/<target>/engine.json``: what a bundle's engines were built from, with what, and for which machine.

    {"engine": "onnxruntime", "version": "1.31.1", "os": "linux", "arch": "x86_64", "cpu": ["avx2", "avx512f"],
     "components": {"unet": {"file": "unet.optimized.onnx", "model_sha256": "..."}}}

An engine fits the library version, operating system and processor that it was built with, and the ONNX file that it
was built from. ``check`` refuses any other before a library sees it: some would crash on it, some would draw rubbish.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgediffusion.bundle import Bundle
from edgediffusion.errors import ArgumentError, BundleError, EngineError
from edgediffusion.files import dump_json
from edgediffusion.registry import find

ENGINES = "engines"
FILE = "engine.json"
ONNX = "onnx"  # the name, in place of a target's, of the ONNX files themselves

# Instruction sets that CPU libraries choose memory layouts and kernels by.
_CPU_FEATURES = ("asimddp", "avx", "avx2", "avx512_bf16", "avx512_vnni", "avx512f", "avx_vnni", "amx_int8", "i8mm", "sve")


@dataclass(frozen=True)
class Host:
    """The machine as far as an engine depends on it; ``cpu`` is empty where the system does not tell."""

    os: str
    arch: str
    cpu: tuple[str, ...]


@dataclass(frozen=True)
class BuiltComponent:
    """``file`` is relative to the folder of ``engine.json``; the hash is that of the ONNX file it was built from."""

    file: str
    model_sha256: str


@dataclass(frozen=True)
class EngineManifest:
    engine: str
    version: str
    os: str
    arch: str
    cpu: tuple[str, ...]
    components: Mapping[str, BuiltComponent]

    @classmethod
    def of(cls, engine: str, version: str, bundle: Bundle, files: Mapping[str, str]) -> EngineManifest:
        """The manifest of engines built here: ``files`` gives the engine file of each component."""
        machine = host()
        built = {name: BuiltComponent(file, bundle.files[bundle.component(name).model].sha256) for name, file in files.items()}
        return cls(engine, version, machine.os, machine.arch, machine.cpu, built)

    def to_json(self) -> str:
        return dump_json(asdict(self))


def host() -> Host:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    flags = next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())
    return Host(platform.system().lower(), platform.machine().lower(), tuple(f for f in _CPU_FEATURES if f in flags))


def choose(bundle: Bundle, target: str | None) -> str:
    """The target whose engines to run, or ``ONNX`` for the ONNX files: those are run where nothing was built.

    Raises:
        ArgumentError: engines for several targets and none named, or none for the target named.
    """
    if target == ONNX or (target is None and not bundle.targets):
        return ONNX
    if target is None and len(bundle.targets) == 1:
        return bundle.targets[0]
    allowed = ", ".join((*bundle.targets, ONNX))
    if target is None:
        raise ArgumentError("The bundle has engines for several targets", allowed=allowed, do="Name one of them.")
    if target not in bundle.targets:
        raise ArgumentError(
            f"The bundle has no engines for the target '{target}'",
            allowed=allowed,
            do=f"Build them with: edgediffusion build {bundle.path} --target {target} -o NEW",
        )
    return target


def read(bundle: Bundle, target: str) -> EngineManifest:
    """Read the manifest of a target's engines. Fields that this version does not know are left alone.

    Raises:
        BundleError: the file is missing or damaged.
    """
    file = bundle.path / ENGINES / target / FILE
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        components = {name: BuiltComponent(c["file"], c["model_sha256"]) for name, c in content["components"].items()}
        engine, version, system, arch = (str(content[key]) for key in ("engine", "version", "os", "arch"))
        return EngineManifest(engine, version, system, arch.lower(), tuple(content.get("cpu", ())), components)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"'{file}' is missing or damaged: {type(error).__name__}: {error}", do=_rebuild(bundle, target)) from None


def check(manifest: EngineManifest, bundle: Bundle, target: str) -> None:
    """Refuse engines that were built with or for something else than what is here.

    Raises:
        EngineError: library version, operating system, processor or the ONNX file differ; the message says which.
        MissingExtra: the engine's library is not installed.
    """
    here, version = host(), find("runtimes.engines", manifest.engine).version()
    found = {"version": version, "os": here.os, "arch": here.arch, "cpu": here.cpu or manifest.cpu}
    stated = {"version": manifest.version, "os": manifest.os, "arch": manifest.arch, "cpu": manifest.cpu or here.cpu}
    words = {"version": f"{manifest.engine} version", "os": "operating system", "arch": "architecture", "cpu": "processor"}
    differing = [f"{words[k]} {_text(stated[k])}, here {_text(found[k])}" for k in words if stated[k] != found[k]]
    for component in bundle.components:
        built = manifest.components.get(component.name)
        if built is None:
            continue
        if built.model_sha256 != bundle.files[component.model].sha256:
            differing.append(f"the ONNX file of '{component.name}' has changed since")
        if f"{ENGINES}/{target}/{built.file}" not in bundle.files:
            differing.append(f"the file '{built.file}' is not among the bundle's files")
    if differing:
        raise EngineError(
            f"The engines for '{target}' were built for something else", got="; ".join(differing), do=_rebuild(bundle, target)
        )


def _rebuild(bundle: Bundle, target: str) -> str:
    return f"Build them anew with: edgediffusion build {bundle.path} --target {target} -o NEW"


def _text(value: object) -> str:
    return "+".join(value) if isinstance(value, tuple) else str(value)
