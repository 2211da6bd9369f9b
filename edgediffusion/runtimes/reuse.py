"""Engines of an earlier build that a new one may take as they are, so that changing one component builds that one only."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgediffusion.bundle import Bundle, Component
from edgediffusion.bundle.checks import damaged
from edgediffusion.errors import ArgumentError, BundleError, EngineError
from edgediffusion.files import link_or_copy
from edgediffusion.registry import find
from edgediffusion.runtimes.engine_manifest import ENGINES, EngineManifest, driver_of, host, read, weights_digest
from edgediffusion.runtimes.engines._described import described
from edgediffusion.runtimes.sizes import SizeRange, Sizes, ranges_for


@dataclass(frozen=True)
class Wanted:
    """What the engine of a component would be built with now. ``engines`` are those that come into question, ``precision`` None where
    nothing was asked for; ``shapes`` the ranges of sizes."""

    bundle: Bundle
    engines: Collection[str]
    precision: str | None
    shapes: Sizes
    compute_capability: str
    measured: bool
    max_error: float


@dataclass(frozen=True)
class Earlier:
    """The engines for one target of an earlier bundle. ``manifest`` is None where theirs cannot be read: then nothing is taken."""

    bundle: Bundle
    target: str
    manifest: EngineManifest | None

    @classmethod
    def of(cls, bundle: Bundle, target: str, *, required: bool) -> Earlier:
        """
        Raises:
            ArgumentError: ``required``, and the bundle has no engines for the target.
        """
        if required and target not in bundle.targets:
            raise ArgumentError(
                f"'{bundle.path}' has no engines for '{target}' to take",
                allowed=", ".join(bundle.targets) or "none: it was never built",
                do="Name the output of an earlier build for this target.",
            )
        try:
            return cls(bundle, target, read(bundle, target))
        except BundleError:
            return cls(bundle, target, None)

    def fits(self, component: Component, wanted: Wanted) -> bool:
        """Whether a build now would make the same engine: of the same graph, weights, sizes, precision, library, system and device."""
        known = self.manifest
        if known is None or component.name not in known.components:
            return False
        built, name = known.components[component.name], known.engine_of(component.name)
        here, place = host(), f"{ENGINES}/{self.target}/{built.file}"
        alike = (
            name in wanted.engines
            and known.versions()[name] == find("runtimes.engines", name).version()
            and (known.os, known.arch, known.compute_capability) == (here.os, here.arch, wanted.compute_capability)
            and (known.cpu == here.cpu or bool(known.compute_capability))
            and (not known.driver or known.driver == driver_of(known.compute_capability))
            and built.model_sha256 == wanted.bundle.files[component.model].sha256
            and built.weights_sha256 == weights_digest(wanted.bundle, component)
            and self._same_choice(component.name, wanted)
        )
        return alike and place in self.bundle.files and not damaged(self.bundle, place) and self._same_sizes(component, name, wanted)

    def engine(self, component: str) -> tuple[str, str]:
        """Name of a component's engine, and its precision."""
        assert self.manifest is not None
        chosen = next((t for t in self.trials(component) if t["chosen"]), None)
        return self.manifest.engine_of(component), str(chosen["precision"]) if chosen else self.manifest.precision

    def trials(self, component: str) -> list[dict[str, Any]]:
        """The rows by which a component's engine was picked, where it was measured."""
        return [dict(t) for t in (self.manifest.trials if self.manifest else ()) if t["component"] == component]

    def take(self, component: str, place: Path) -> str:
        """Put the engine's files into a folder, linked where that is possible; the name of the engine's own."""
        assert self.manifest is not None
        folder, file = f"{ENGINES}/{self.target}/", self.manifest.components[component].file
        for name in self.bundle.files:
            if name.startswith(folder + file):
                link_or_copy(self.bundle.path / name, place / name.removeprefix(folder))
        return file

    def _same_choice(self, component: str, wanted: Wanted) -> bool:
        """Of engines that are picked by measuring, one that was picked so, within the error that is allowed now."""
        trials = self.trials(component)
        if wanted.measured != bool(trials):
            return False
        _, precision = self.engine(component)
        asked = wanted.precision or ""
        return precision == asked or (wanted.measured and not asked and all(t["error"] <= wanted.max_error for t in trials if t["chosen"]))

    def _same_sizes(self, component: Component, engine: str, wanted: Wanted) -> bool:
        """For an engine that is made for sizes: what is written beside it."""
        if "shapes" not in getattr(find("runtimes.engines", engine), "options", ()):
            return True
        assert self.manifest is not None
        try:
            known = described(self.bundle.path / ENGINES / self.target / self.manifest.components[component.name].file)
            ranges = ranges_for(component.inputs, wanted.shapes, component.name)
        except EngineError:
            return False
        usual = {axis: r.usual for axis, r in ranges.items()}
        fixed = {axis: SizeRange(size, size, size) for axis, size in usual.items()}
        return known.ranges in ({}, ranges, fixed) and known.usual in ({}, usual) and bool(known.ranges or known.usual) == bool(ranges)
