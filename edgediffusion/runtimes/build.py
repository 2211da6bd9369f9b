"""Build: the engines of one target, made from a bundle's graphs and kept in a new bundle with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgediffusion import __version__, files, registry, targets
from edgediffusion.bundle import Bundle, Component, Verb, write
from edgediffusion.errors import EngineError
from edgediffusion.files import link_or_copy
from edgediffusion.runtimes.engine_manifest import ENGINES, FILE, EngineManifest

Progress = Callable[[str, float], None]


def build(
    bundle: Bundle, output: Path, *, target: str = "cpu-x86-64", threads: int | None = None, progress: Progress = lambda label, part: None
) -> Bundle:
    """Make an engine of every component for ``target``; returns the new bundle, which holds the graphs as well.

    Raises:
        UnknownName: there is no such target.
        MissingExtra, EngineError: the engine library is absent, or it refused a component (which is named).
        OutputError: ``output`` exists or cannot be written.
    """
    device = targets.load(target)
    name = device.engines[0]
    engine = registry.find("runtimes.engines", name, kind="engine")
    version = engine.version()
    with files.new_folder(output) as folder:
        kept = [n for n in bundle.files if not n.startswith(f"{ENGINES}/{device.name}/")]
        for file in kept:
            link_or_copy(bundle.path / file, folder / file)
        place = folder / ENGINES / device.name
        place.mkdir(parents=True)
        built = {}
        for at, component in enumerate(bundle.components):
            progress(component.name, at / len(bundle.components))
            built[component.name] = _build_one(engine, bundle, component, place, threads)
        progress("done", 1.0)
        (place / FILE).write_text(EngineManifest.of(name, version, bundle, built).to_json(), encoding="utf-8")
        write(
            folder,
            family=bundle.family,
            components=bundle.components,
            sampling=bundle.sampling,
            history=(*bundle.history, Verb("build", {"target": device.name}, {"edgediffusion": __version__, name: version})),
            known={n: bundle.files[n] for n in kept},
        )
    return Bundle.open(output)


def _build_one(engine: Any, bundle: Bundle, component: Component, place: Path, threads: int | None) -> str:
    file: str = component.name + engine.suffix
    try:
        engine.build(bundle.path / component.model, place / file, threads=threads)
    except EngineError as error:
        raise EngineError(f"The component '{component.name}' could not be built: {error}") from error
    return file
