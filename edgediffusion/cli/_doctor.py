"""What is installed and what this machine has; nothing is imported to find out."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from edgediffusion import __version__, targets
from edgediffusion.errors import ArgumentError
from edgediffusion.targets import in_range
from edgediffusion.text import size, table

_PACKAGE = "edgediffusion"
_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
_PURPOSES = {
    "numpy": "arrays: everything needs it",
    "click": "the command line",
    "onnxruntime": "runs bundles on this CPU",
    "onnxruntime-gpu": "runs bundles on an NVIDIA GPU",
    "tokenizers": "turns prompts into token ids",
    "pillow": "reads and writes pictures",
    "torch": "exports and calibrates pipelines",
    "diffusers": "reads the pipelines that are exported",
    "transformers": "reads the text encoders that are exported",
    "safetensors": "reads the weights that are exported",
    "onnx": "writes and checks graphs",
    "onnx-ir": "edits graphs without loading their weights",
    "onnxscript": "simplifies traced graphs",
    "nvidia-modelopt": "finds ranges for recipes that ask for its algorithms",
    "ml-dtypes": "holds the numbers of few bits that NumPy lacks",
    "openvino": "runs bundles with OpenVINO on CPUs and GPUs",
    "tensorrt": "builds and runs engines on NVIDIA servers and Jetsons",
    "tensorrt-rtx-cu13": "builds and runs engines for GeForce RTX",
    "cuda-python": "moves buffers to and from an NVIDIA GPU",
}
_OTHER = {"polygraphy": "compares engines layer by layer"}  # useful beside us, needed by nothing here


@dataclass(frozen=True)
class Piece:
    """A package: ``installed`` is None where it is missing, ``fits`` whether that version is in ``wanted``."""

    package: str
    wanted: str
    installed: str | None
    fits: bool
    purpose: str
    get: str


@dataclass(frozen=True)
class Machine:
    """``memory_bytes`` and ``cores`` are what this process may use: the machine's, or less where a cgroup says so."""

    system: str
    processor: str
    features: tuple[str, ...]
    cores: int
    cores_allowed: float
    memory_bytes: int
    memory_allowed_bytes: int
    disk_free_bytes: int
    accelerators: tuple[targets.Device, ...]
    target: str | None


@dataclass(frozen=True)
class Findings:
    version: str
    python: str
    python_wanted: str
    pieces: tuple[Piece, ...]
    providers: tuple[str, ...]
    machine: Machine
    advice: tuple[str, ...]


def examine() -> Findings:
    pieces = tuple(_piece(name, wanted, extra) for name, (wanted, extra) in _requirements().items())
    return Findings(
        version=__version__,
        python=platform.python_version(),
        python_wanted=metadata.metadata(_PACKAGE)["Requires-Python"],
        pieces=pieces,
        providers=_providers(),
        machine=_machine(),
        advice=_advice(pieces),
    )


def text(found: Findings) -> str:
    def state(piece: Piece) -> str:
        return "missing" if piece.installed is None else piece.installed + ("" if piece.fits else " (unsuitable)")

    rows = [(p.package, state(p), p.wanted or "any", p.purpose, "" if p.fits else p.get) for p in found.pieces]
    here = found.machine
    lines = [
        f"edgediffusion {found.version}, Python {found.python} (wanted {found.python_wanted})",
        "",
        table(("package", "installed", "wanted", "what it gives", "how to get it"), rows),
        "",
        f"ONNX Runtime providers: {', '.join(found.providers) or 'none'}",
        f"machine: {here.system}, {here.processor}",
        f"instructions for int8 and bfloat16: {', '.join(here.features) or 'none known'}",
        f"cores: {here.cores_allowed:g} of {here.cores}; memory: {size(here.memory_allowed_bytes)} of {size(here.memory_bytes)}",
        f"free disk here: {size(here.disk_free_bytes)}",
        f"accelerators: {', '.join(map(_accelerator, here.accelerators)) or 'none found'}",
        f"target: {here.target or 'none describes this machine; see edgediffusion targets'}",
        *found.advice,
    ]
    return "\n".join(lines)


def _accelerator(device: targets.Device) -> str:
    told = (f"{device.memory_gb:.3g} GB", f"compute capability {device.compute_capability}", f"driver {device.driver}")
    known = (bool(device.memory_gb), bool(device.compute_capability), bool(device.driver))
    words = [text for text, there in zip(told, known, strict=True) if there]
    return device.name + (f" ({', '.join(words)})" if words else "")


def _requirements() -> dict[str, tuple[str, str]]:
    """Package -> (versions wanted, first extra that brings it), from this package's own metadata."""
    found: dict[str, tuple[str, str]] = {}
    for line in metadata.requires(_PACKAGE) or []:
        match = re.match(r"([\w.-]+)\s*(\[[^]]*\])?\s*([^;]*)(?:;(.*))?$", line)
        if match is None or match[1] not in _PURPOSES:
            continue
        extra = re.search(r"extra == ['\"](\w+)['\"]", match[4] or "")
        found.setdefault(match[1], (match[3].strip(), extra[1] if extra else ""))
    return {**found, **{name: ("", "") for name in _OTHER}}


def _piece(name: str, wanted: str, extra: str) -> Piece:
    try:
        installed: str | None = metadata.version(name)
    except metadata.PackageNotFoundError:
        installed = None
    get = f"pip install '{_PACKAGE}[{extra}]'" if extra else f"pip install '{name}{wanted}'"
    fits = installed is not None and in_range(installed, wanted)
    return Piece(name, wanted, installed, fits, {**_PURPOSES, **_OTHER}[name], get)


def _providers() -> tuple[str, ...]:
    """The providers of the installed ONNX Runtime packages, told by their names: asking it would import it."""
    names = {
        "onnxruntime": "CPU",
        "onnxruntime-gpu": "CPU, CUDA, TensorRT",
        "onnxruntime-openvino": "CPU, OpenVINO",
        "onnxruntime-directml": "CPU, DirectML",
    }
    return tuple(p for package, provides in names.items() if _version(package) for p in provides.split(", "))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _advice(pieces: tuple[Piece, ...]) -> tuple[str, ...]:
    missing = {p.package for p in pieces if p.installed is None}
    advice = []
    if {"onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx-cu13"} <= missing:
        advice.append(f"No engine is installed, so nothing can run. Begin with: pip install '{_PACKAGE}[cpu]'")
    if _version("onnxruntime") and _version("onnxruntime-gpu"):
        advice.append("onnxruntime and onnxruntime-gpu overwrite each other's files. Keep one: pip uninstall onnxruntime")
    advice += [f"{p.package} {p.installed} is outside {p.wanted}: {p.get}" for p in pieces if p.installed and not p.fits]
    return tuple(advice)


def _machine() -> Machine:
    cores, memory, machine = os.cpu_count() or 1, _memory(), targets.this_machine()
    try:
        target: str | None = targets.detect(machine)
    except ArgumentError:
        target = None
    processor, features = _processor()
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        processor=processor,
        features=features,
        cores=cores,
        cores_allowed=_cores_allowed(cores),
        memory_bytes=memory,
        memory_allowed_bytes=min(filter(None, (memory, _cgroup_number("memory.max", "memory/memory.limit_in_bytes"))), default=0),
        disk_free_bytes=shutil.disk_usage(Path.cwd()).free,
        accelerators=machine.devices,
        target=target,
    )


def _processor() -> tuple[str, tuple[str, ...]]:
    """Name and the instruction sets of ``_FEATURES``; only Linux tells them without asking the processor itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), ()
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    flags = set(values.get("flags", values.get("Features", "")).split())
    return values.get("model name", platform.machine()), tuple(f for f in _FEATURES if f in flags)


def _memory() -> int:
    if sys.platform == "win32":
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cores_allowed(cores: int) -> float:
    allowed: float = len(os.sched_getaffinity(0)) if sys.platform == "linux" else cores
    quota, _, period = (_cgroup("cpu.max") or "").partition(" ")
    if quota.isdigit() and period.isdigit():
        allowed = min(allowed, int(quota) / int(period))
    return allowed


def _cgroup_number(*names: str) -> int | None:
    return next((int(value) for value in map(_cgroup, names) if value and value.isdigit()), None)


def _cgroup(name: str) -> str | None:
    """A limit of this process's control group, version 2 first; None where there is none."""
    try:
        own = Path("/proc/self/cgroup").read_text(encoding="utf-8").rpartition("::")[2].strip().lstrip("/")
        root = Path("/sys/fs/cgroup")
        return next((f.read_text(encoding="utf-8").strip() for f in (root / own / name, root / name) if f.is_file()), None)
    except OSError:
        return None
