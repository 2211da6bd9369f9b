"""``engines/<target>/engine.json``: what a bundle's engines were built from, with what, and for which machine.

    {"engine": "onnxruntime", "version": "1.31.1", "os": "linux", "arch": "x86_64", "cpu": ["avx2", "avx512f"],
     "compute_capability": "", "driver": "", "precision": "", "state": "",
     "components": {"unet": {"file": "unet.optimized.onnx", "model_sha256": "...", "weights_sha256": "...",
                             "shapes": {"batch": [1, 2, 4]}}}}

An engine fits the library version, operating system and processor, or GPU and driver, that it was built with or for, and the graph and
weights that it was built from. ``check`` refuses any other before a library sees it: some would crash on it, some would draw rubbish.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edgediffusion import targets
from edgediffusion.bundle import Bundle, Component
from edgediffusion.errors import ArgumentError, BundleError
from edgediffusion.files import dump_json

ENGINES = "engines"
FILE = "engine.json"
ONNX = "onnx"  # the name, in place of a target's, of the ONNX files themselves

# Instruction sets that CPU libraries choose memory layouts and kernels by.
_CPU_FEATURES = ("asimddp", "avx", "avx2", "avx512_bf16", "avx512_vnni", "avx512f", "avx_vnni", "amx_int8", "i8mm", "sve")
_NONE: Mapping[str, Mapping[str, tuple[int, ...]]] = MappingProxyType({})


@dataclass(frozen=True)
class Host:
    """The machine as far as an engine depends on it; ``cpu`` is empty where the system does not tell."""

    os: str
    arch: str
    cpu: tuple[str, ...]


@dataclass(frozen=True)
class BuiltComponent:
    """``file`` is relative to the folder of ``engine.json``; the hashes are those of the ONNX file it was built from and of that one's
    weights (``weights_digest``). ``shapes`` are the smallest, usual and largest sizes of the axes for which the engine has a range; others
    may have any size. ``engine`` and ``version`` are empty where they are the manifest's."""

    file: str
    model_sha256: str
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    engine: str = ""
    version: str = ""
    weights_sha256: str = ""


@dataclass(frozen=True)
class EngineManifest:
    """``compute_capability`` is that of the GPU it is for, and then the processor does not matter; ``driver`` that GPU's where it was built
    on one, and older ones may not run it; ``precision`` what float layers are computed in, where that was asked for; ``state`` the digest
    of the quantization state that the graphs were made with. ``trials`` is the table by which engines were picked, where they were
    measured (``pick.Trial``)."""

    engine: str
    version: str
    os: str
    arch: str
    cpu: tuple[str, ...]
    components: Mapping[str, BuiltComponent]
    compute_capability: str = ""
    precision: str = ""
    state: str = ""
    trials: tuple[Mapping[str, Any], ...] = ()
    driver: str = ""

    @classmethod
    def of(
        cls,
        engine: str,
        version: str,
        bundle: Bundle,
        files: Mapping[str, str],
        *,
        shapes: Mapping[str, Mapping[str, tuple[int, ...]]] = _NONE,
        compute_capability: str = "",
        precision: str = "",
    ) -> EngineManifest:
        """The manifest of engines built here: ``files`` gives the engine file of each component, ``shapes`` its ranges of sizes."""
        machine = host()
        of = {name: bundle.component(name) for name in files}
        built = {
            name: BuiltComponent(
                file, bundle.files[of[name].model].sha256, shapes.get(name, {}), weights_sha256=weights_digest(bundle, of[name])
            )
            for name, file in files.items()
        }
        state = next((str(verb.arguments.get("state", "")) for verb in reversed(bundle.history) if verb.name == "quantize"), "")
        cpu = () if compute_capability else machine.cpu
        driver = driver_of(compute_capability) if compute_capability else ""
        return cls(engine, version, machine.os, machine.arch, cpu, built, compute_capability, precision, state, driver=driver)

    def served_by(self, others: Mapping[str, tuple[str, str]], trials: Sequence[Mapping[str, Any]]) -> EngineManifest:
        """The same, with components that another engine of a version serves, and the table that says why."""
        named = {n: replace(c, engine=others[n][0], version=others[n][1]) if n in others else c for n, c in self.components.items()}
        return replace(self, components=named, trials=tuple(trials))

    def engine_of(self, component: str) -> str:
        return self.components[component].engine or self.engine

    def versions(self) -> dict[str, str]:
        """Every engine of it with its version."""
        return {self.engine: self.version, **{c.engine: c.version for c in self.components.values() if c.engine}}

    def to_json(self) -> str:
        return dump_json(asdict(self))


def host() -> Host:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    flags = next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())
    return Host(platform.system().lower(), platform.machine().lower(), tuple(f for f in _CPU_FEATURES if f in flags))


def driver_of(compute_capability: str) -> str:
    """The driver of a GPU here of this compute capability; "" where there is none, or it does not tell."""
    here = targets.this_machine().devices
    return next((device.driver for device in here if device.compute_capability == compute_capability), "")


def weights_digest(bundle: Bundle, component: Component) -> str:
    """sha256 over the names and hashes of the files beside a component's graph: its weights, which may change when the graph does not."""
    folder = component.model.rpartition("/")[0] + "/"
    beside = sorted(name for name in bundle.files if name.startswith(folder) and name != component.model)
    lines = "".join(f"{name.removeprefix(folder)} {bundle.files[name].sha256}\n" for name in beside)
    return hashlib.sha256(lines.encode()).hexdigest()


def choose(bundle: Bundle, target: str | None) -> str:
    """The target whose engines to run, or ``ONNX`` for the ONNX files: those are run where nothing was built. ``auto`` is the target that
    this machine is.

    Raises:
        ArgumentError: engines for several targets and none named, or none for the target named.
    """
    target = targets.detect() if target == targets.AUTO else target
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
        components = {
            name: BuiltComponent(
                c["file"],
                c["model_sha256"],
                {axis: tuple(r) for axis, r in c.get("shapes", {}).items()},
                str(c.get("engine", "")),
                str(c.get("version", "")),
                str(c.get("weights_sha256", "")),
            )
            for name, c in content["components"].items()
        }
        engine, version, system, arch = (str(content[key]) for key in ("engine", "version", "os", "arch"))
        later = {key: str(content.get(key, "")) for key in ("compute_capability", "precision", "state", "driver")}
        cpu, trials = tuple(content.get("cpu", ())), tuple(content.get("trials", ()))
        return EngineManifest(engine, version, system, arch.lower(), cpu, components, **later, trials=trials)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"'{file}' is missing or damaged: {type(error).__name__}: {error}", do=rebuilding(bundle, target)) from None


def asked(bundle: Bundle, target: str) -> dict[str, str]:
    """The options of ``build`` that a target's engines were last made with, by the bundle's history."""
    made = next((v.arguments for v in reversed(bundle.history) if v.name == "build" and v.arguments.get("target") == target), {})
    shapes = made.get("shapes") or {}
    options = {key: str(made[key]) for key in ("precision", "pick", "max_error") if made.get(key)}
    return options | ({"shapes": ",".join(f"{axis}={size}" for axis, size in shapes.items())} if shapes else {})


def rebuilding(bundle: Bundle, target: str, shapes: str = "") -> str:
    """What to do about engines that cannot be opened: the command that builds them with the options they had, or for other shapes."""
    given = asked(bundle, target) | ({"shapes": shapes} if shapes else {})
    options = "".join(f" --{key.replace('_', '-')} {value}" for key, value in given.items())
    return (
        f"Build them anew with: edgediffusion build {bundle.path} --target {target}{options} -o NEW, "
        "or in their place with --rebuild, where they are run."
    )
