"""What a device found, written back: a bundle with the engines that were built there, how far they are off, and what they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgediffusion import __version__
from edgediffusion.bundle import Bundle, Verb, write
from edgediffusion.files import dump_json, link_or_copy, new_folder
from edgediffusion.runtimes.engine_manifest import ENGINES, FILE, EngineManifest
from edgediffusion.runtimes.kit import Kit
from edgediffusion.runtimes.kit.build import BUILT, Built
from edgediffusion.runtimes.kit.machine import Facts
from edgediffusion.runtimes.kit.verify import Verified
from edgediffusion.runtimes.sizes import axes_of, range_of

RESULTS = "results.json"


def results(kit: Kit, facts: Facts, built: Mapping[str, Built], found: Mapping[str, Verified]) -> dict[str, Any]:
    """All of it as JSON: the device, and for each component what building took and what verifying found."""
    plain = {name: {k: v for k, v in asdict(one).items() if k not in ("folder", "kept")} for name, one in built.items()}
    return {
        "target": kit.target.name,
        "engine": {"name": kit.engine, "version": facts.library},
        "kit": {"bundle": kit.digest, "edgediffusion": kit.version},
        "device": {
            "names": [device.name for device in facts.machine.devices],
            "release": facts.machine.release,
            "compute_capability": facts.compute_capability,
            "memory_bytes": facts.memory_bytes,
            "swaps": [asdict(swap) for swap in facts.swaps],
            "power_mode": facts.power_mode,
        },
        "components": {name: {"build": plain[name], "run": {**asdict(one), "good": one.good}} for name, one in found.items()},
    }


def write_bundle(kit: Kit, facts: Facts, built: Mapping[str, Built], found: Mapping[str, Verified], output: Path) -> Bundle:
    """The kit's bundle with its engines and ``engines/<target>/results.json``, in a new folder; files are linked.

    Raises:
        OutputError: ``output`` exists, cannot be written, or the disk is full.
    """
    bundle, name = kit.bundle(), kit.target.name
    with new_folder(output) as folder:
        kept = [n for n in bundle.files if not n.startswith(f"{ENGINES}/{name}/")]
        for file in kept:
            link_or_copy(bundle.path / file, folder / file)
        place = folder / ENGINES / name
        for one in built.values():
            for file_ in sorted(one.folder.iterdir()):
                if file_.name != BUILT:
                    link_or_copy(file_, place / file_.name)
        manifest = _manifest(kit, facts, bundle, built)
        (place / FILE).write_text(manifest.to_json(), encoding="utf-8")
        (place / RESULTS).write_text(dump_json(results(kit, facts, built, found)), encoding="utf-8")
        shapes = {axis: str(size) for axis, size in kit.shapes.items()}
        verb = Verb("build", {"target": name, "kit": kit.digest, "shapes": shapes}, {"edgediffusion": __version__, **manifest.versions()})
        write(
            folder,
            family=bundle.family,
            components=bundle.components,
            sampling=bundle.sampling,
            history=(*bundle.history, verb),
            known={n: bundle.files[n] for n in kept},
        )
    return Bundle.open(output, verify=False)


def _manifest(kit: Kit, facts: Facts, bundle: Bundle, built: Mapping[str, Built]) -> EngineManifest:
    shapes = {
        name: {
            axis: (r.smallest, r.usual, r.largest)
            for axis in axes_of(bundle.component(name).inputs)
            if (r := range_of(axis, kit.shapes)) is not None
        }
        for name in built
    }
    files = {name: one.file for name, one in built.items()}
    capability, ranged = kit.target.compute_capability, kit.target.compute_capability or kit.target.device == "npu"
    return EngineManifest.of(kit.engine, facts.library, bundle, files, shapes=shapes if ranged else {}, compute_capability=capability)
