"""The engines of a kit, built one component at a time, each in a process of its own and kept until all are there.

    work/engines/<component>/    the engine's files, and built.json: what it was made from, with what, and what that took
    work/timing-<version>.cache  what kernels took (TensorRT); another version would refuse it

A component whose ``built.json`` says what would be made now, and whose files have the bytes that it states, is not built again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgediffusion.bundle import Bundle, Component, File
from edgediffusion.errors import EngineError
from edgediffusion.files import dump_json, new_folder, sha256
from edgediffusion.registry import find
from edgediffusion.runtimes.kit import Kit, Progress
from edgediffusion.runtimes.kit.machine import Facts, available_bytes
from edgediffusion.runtimes.kit.worker import ask

BUILT = "built.json"
_PART = 4  # of the memory that is available is a kernel's workspace, if nothing else is said
_LEAST_WORKSPACE = 64 << 20


@dataclass(frozen=True)
class Built:
    """An engine in ``folder``. ``least_available_bytes`` is the lowest that the system's available memory came to while it was built, 0 if
    it does not tell; on a Jetson that counts the GPU's too, which no process is charged with. ``workspace_bytes`` is 0 for engines that
    cannot be bounded."""

    folder: Path
    file: str
    seconds: float
    peak_bytes: int
    least_available_bytes: int
    workspace_bytes: int
    kept: bool


def build_engines(
    kit: Kit,
    facts: Facts,
    work: Path,
    *,
    workspace_bytes: int | None = None,
    root: Path = Path("/"),
    progress: Progress = lambda label, part: None,
) -> dict[str, Built]:
    """Engines of every component, in the order of the bundle; those that are there already are kept. ``workspace_bytes`` bounds what one
    kernel may use beside its tensors, by default a quarter of what is available when its component's turn comes.

    Raises:
        EngineError: the engine library refused a component, or memory ran out; what was built before is kept.
        OutputError: ``work`` cannot be written, or the disk is full.
    """
    bundle, made = kit.bundle(), {}
    for at, component in enumerate(bundle.components):
        wanted, folder = _made_with(kit, bundle, component, facts), work / "engines" / component.name

        def part_of(label: str, part: float, at: int = at) -> None:
            progress(label, (at + part) / len(bundle.components))

        known = _known(folder, wanted)
        if known is None:
            shutil.rmtree(folder, ignore_errors=True)
            memory = workspace_bytes or max(available_bytes(root) // _PART, _LEAST_WORKSPACE) if _bounded(kit) else 0
            known = _build(kit, bundle, component, folder, wanted, memory, root, part_of)
        made[component.name] = known
    progress("done", 1.0)
    return made


def _bounded(kit: Kit) -> bool:
    """Whether the engine lets one say how much memory a kernel may have."""
    return "workspace_bytes" in getattr(find("runtimes.engines", kit.engine), "options", ())


def _made_with(kit: Kit, bundle: Bundle, component: Component, facts: Facts) -> dict[str, Any]:
    """What must be the same for an engine to be kept."""
    return {
        "model_sha256": bundle.files[component.model].sha256,
        "weights": sorted(bundle.files[n].sha256 for n in bundle.files if n.startswith(component.model.rsplit("/", 1)[0] + "/")),
        "engine": kit.engine,
        "version": facts.library,
        "compute_capability": facts.compute_capability,
        "shapes": {axis: str(size) for axis, size in kit.shapes.items()},
    }


def _known(folder: Path, wanted: Mapping[str, Any]) -> Built | None:
    try:
        content = json.loads((folder / BUILT).read_text(encoding="utf-8"))
        files = {name: File(**file) for name, file in content["files"].items()}
        whole = all((folder / name).stat().st_size == f.bytes and sha256(folder / name) == f.sha256 for name, f in files.items())
        return Built(folder, **content["built"], kept=True) if whole and content["made_with"] == wanted else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # nothing was built, or it was stopped, or somebody changed it: it is built again


def _build(
    kit: Kit,
    bundle: Bundle,
    component: Component,
    folder: Path,
    wanted: Mapping[str, Any],
    workspace_bytes: int,
    root: Path,
    progress: Progress,
) -> Built:
    least = [available_bytes(root)]

    def watch() -> None:
        least[0] = min(least[0], available_bytes(root))

    progress(f"{component.name}: building", 0.0)
    with new_folder(folder) as partial:
        capability = kit.target.compute_capability
        job = {
            "do": "build",
            "component": component.name,
            "engine": kit.engine,
            "model": str(bundle.path / component.model),
            "output": str(partial),
            "shapes": {axis: [r.smallest, r.usual, r.largest] for axis, r in kit.shapes.items()},
            "options": {
                "device": kit.target.device,
                "compute_capabilities": [capability] if capability else [],
                "timing_cache": str(folder.parent.parent / f"timing-{wanted['version']}.cache"),
                "workspace_bytes": workspace_bytes,
            },
        }
        try:
            done = ask(job, progress, watch=watch)
        except EngineError as error:
            raise EngineError(f"The component '{component.name}' could not be built: {error}") from error
        built = Built(folder, done["file"], done["seconds"], done["peak_bytes"], least[0], workspace_bytes, kept=False)
        files = {p.name: asdict(File(sha256(p), p.stat().st_size)) for p in sorted(partial.iterdir())}
        plain = {key: value for key, value in asdict(built).items() if key not in ("folder", "kept")}
        (partial / BUILT).write_text(dump_json({"made_with": wanted, "files": files, "built": plain}), encoding="utf-8")
    return built
