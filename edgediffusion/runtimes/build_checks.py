"""What is refused before anything is built: a place, a library, an option, a graph or an axis that cannot be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgediffusion import registry, targets
from edgediffusion.bundle import Bundle, Component
from edgediffusion.errors import ArgumentError, EngineError
from edgediffusion.runtimes.onnx_header import read_header
from edgediffusion.runtimes.reuse import Earlier, Wanted
from edgediffusion.runtimes.sizes import Sizes, axes_of
from edgediffusion.targets import Target

_REFUSED = ("fp8", "fp4")  # formats that a graph has by intention only, and that an engine without kernels fails on, late and in its words


@dataclass(frozen=True)
class Job:
    """Everything a component's engine is made with; ``given`` are the options of the engines' ``build`` that were asked for, and
    ``engines`` those of the target that come into question."""

    bundle: Bundle
    target: Target
    engines: tuple[str, ...]
    given: Mapping[str, Any]
    shapes: Sizes
    asked: Sizes
    threads: int | None
    max_error: float
    earlier: Earlier | None = None
    wanted: Wanted | None = None


def check_job(job: Job, *, version: bool) -> None:
    """Refuse all that can be refused before a folder is made; ``version`` also by that of the first engine's library."""
    _check_place(job.target)
    _check_options(job)
    if version:
        check_version(job.target, job.engines[0])
    for component in job.bundle.components:
        _check_graph(job, component)
    _check_axes(job)


def engine_of(name: str) -> Any:
    return registry.find("runtimes.engines", name, kind="engine")


def taken_by(engine: str) -> tuple[str, ...]:
    taken: tuple[str, ...] = getattr(engine_of(engine), "options", ())
    return taken


def _check_options(job: Job) -> None:
    known = {name for engine in job.engines for name in taken_by(engine)}
    if unknown := [name for name, value in job.given.items() if value and name not in known]:
        raise ArgumentError(
            f"The engine '{', '.join(job.engines)}' of the target '{job.target.name}' has no such option",
            got=", ".join("--" + name.replace("_", "-") for name in unknown),
            allowed=", ".join("--" + name.replace("_", "-") for name in job.given if name in known) or "none",
        )


def _check_place(target: Target) -> None:
    here = targets.this_machine()
    if not target.ahead and (target.architecture != here.architecture or here.system not in target.systems):
        raise EngineError(
            f"Engines for '{target.name}' are built on such a machine",
            got=f"{here.system} on {here.architecture}",
            allowed=f"{', '.join(target.systems)} on {target.architecture}",
            do=f"Make a kit of it, which builds there: edgediffusion kit BUNDLE --target {target.name} -o kit.tar",
        )


def check_version(target: Target, engine: str) -> None:
    version, wanted = engine_of(engine).version(), target.libraries.get(engine, "")
    if not targets.in_range(version, wanted):
        raise EngineError(
            f"The target '{target.name}' takes other versions of {engine}",
            got=version,
            allowed=wanted,
            do="Install one of them, or take a target of your own: docs/targets.md.",
        )


def _check_graph(job: Job, component: Component) -> None:
    """Refuse what the target's engine cannot read or has no kernels for, before minutes of building and in our own words."""
    if not all(map(taken_by, job.engines)):  # one of them reads any ONNX file, or none
        return
    header = read_header(job.bundle.path / component.model)
    if lacking := [f for f in header.formats if f in _REFUSED and f not in job.target.formats]:
        able = [name for name in targets.names() if set(lacking) <= set(targets.load(name).formats)]
        raise EngineError(
            f"The target '{job.target.name}' has no kernels for what '{component.name}' is computed in",
            got=", ".join(lacking),
            allowed=", ".join(job.target.formats),
            do=f"Quantize it by another recipe, as int8, or take a target that has them: {', '.join(able) or 'none is known'}.",
        )
    floats = {spec.dtype for spec in header.outputs if spec.dtype.startswith("float")}
    if "compute_capabilities" in taken_by(job.engines[0]) and not floats <= set(job.target.formats):  # typed as the file says
        raise EngineError(
            f"The target '{job.target.name}' has no kernels for the float format of '{component.name}'",
            got=", ".join(sorted(floats)),
            allowed=", ".join(job.target.formats),
            do="Export it again: edgediffusion export SOURCE --dtype fp16 -o BUNDLE",
        )
    if header.opset > job.target.opset:
        raise EngineError(
            f"The target '{job.target.name}' does not read the opset of '{component.name}'",
            got=header.opset,
            allowed=f"{job.target.opset} and older",
            do=f"Lower it: edgediffusion lower BUNDLE --target {job.target.name} -o LOWERED",
        )


def _check_axes(job: Job) -> None:
    known = axes_of([spec for c in job.bundle.components for spec in c.inputs])
    if unknown := [axis for axis in job.asked if axis not in known]:
        raise ArgumentError("No graph of the bundle has such an axis", got=", ".join(unknown), allowed=", ".join(known) or "none")
