"""The bundle: the one thing every verb takes and returns. ``docs/bundle-format.md`` specifies its files.

A bundle is a folder that diffusers-like tools can read too (``model_index.json``, a folder per component with
``model.onnx``), plus ``bundle.json``: what each graph is for, what the sampling loop must know, the sha256 of every
file, and the history of verbs that made it.

    records.py    what the manifest says, as dataclasses
    manifest.py   the manifest as JSON, written and read
    checks.py     whether the files are those that were written
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from edgediffusion.bundle import manifest
from edgediffusion.bundle.checks import Hashes, check_files, check_paths
from edgediffusion.bundle.manifest import FORMAT, MANIFEST, component_facts, sampling_facts
from edgediffusion.bundle.records import (
    CONTROL,
    CUT_ROLES,
    GUIDANCE,
    PREDICTIONS,
    ROLES,
    SHALLOW_CONTROL,
    SIZES,
    TIME_IDS,
    Component,
    DynamicShift,
    File,
    Folded,
    NoiseSchedule,
    Sampling,
    TensorSpec,
    Tokenizer,
    Verb,
    axis_size,
)
from edgediffusion.errors import BundleError
from edgediffusion.files import dump_json

__all__ = [
    "CONTROL",
    "CUT_ROLES",
    "FORMAT",
    "GUIDANCE",
    "MANIFEST",
    "PREDICTIONS",
    "ROLES",
    "SHALLOW_CONTROL",
    "SIZES",
    "TIME_IDS",
    "Bundle",
    "Component",
    "DynamicShift",
    "File",
    "Folded",
    "NoiseSchedule",
    "Sampling",
    "TensorSpec",
    "Tokenizer",
    "Verb",
    "axis_size",
    "component_facts",
    "sampling_facts",
    "write",
]


@dataclass(frozen=True)
class Bundle:
    """A folder on disk and its manifest; never changed once it is written."""

    path: Path
    family: str
    components: tuple[Component, ...]
    sampling: Sampling | None
    history: tuple[Verb, ...]
    files: Mapping[str, File]

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True, skip: str = "") -> Bundle:
        """Read a bundle and check it: format, paths, presence and (with ``verify``) sha256 of every file.

        Files whose path begins with ``skip`` may be missing or damaged: engines that are about to be built anew.

        Raises:
            BundleError: no bundle, a newer format, a path that leaves the folder, a missing or changed file.
        """
        path = Path(path)
        bundle = cls(path, **manifest.read(path))
        check_paths(bundle)
        check_files(bundle, skip, verify=verify)
        return bundle

    def component(self, name: str) -> Component:
        for component in self.components:
            if component.name == name:
                return component
        raise BundleError(f"The bundle has no component '{name}'", allowed=", ".join(c.name for c in self.components))

    def with_role(self, role: str) -> tuple[Component, ...]:
        return tuple(c for c in self.components if c.role == role)

    @property
    def cuts(self) -> tuple[str, ...]:
        """The modules that the denoiser was cut at, in the order of the network: each one's graphs are ``with_cut``."""
        return tuple(dict.fromkeys(c.cut for c in self.components if c.role in CUT_ROLES and c.cut is not None))

    def with_cut(self, cut: str) -> dict[str, Component]:
        """The parts of the denoiser that one cut made, by role.

        Raises:
            BundleError: the bundle has no such cut.
        """
        found = {c.role: c for c in self.components if c.role in CUT_ROLES and c.cut == cut}
        if not found:
            raise BundleError(
                f"The bundle has no graphs for the cut '{cut}'",
                allowed=", ".join(self.cuts) or "none: it was exported without cuts",
                do=f"Export it with this cut: edgediffusion export SOURCE -o BUNDLE --cut {cut}",
            )
        return found

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the targets that engines were built for."""
        return tuple(sorted({PurePosixPath(f).parts[1] for f in self.files if f.startswith("engines/")}))

    @property
    def digest(self) -> str:
        """Identity of the bundle's contents: the hash that its manifest carries."""
        return manifest.digest(manifest.content_of(self))

    def size_bytes(self, prefix: str = "") -> int:
        """Bytes of the files under ``prefix``; a file that is linked twice counts once."""
        return sum({f.sha256: f.bytes for name, f in self.files.items() if name.startswith(prefix)}.values())


def write(
    folder: Path,
    *,
    family: str,
    components: tuple[Component, ...],
    sampling: Sampling | None,
    history: tuple[Verb, ...],
    known: Mapping[str, File] | None = None,
) -> None:
    """Finish a folder whose other files are in place: hash them and write ``bundle.json``.

    ``known`` carries over the hashes of files that were taken unchanged from a verified bundle.
    """
    files = {}
    hashes = Hashes()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = file.relative_to(folder).as_posix()
        if name != MANIFEST:
            files[name] = (known or {}).get(name) or File(hashes(file), file.stat().st_size)
    bundle = Bundle(folder, family, components, sampling, history, files)
    content = manifest.content_of(bundle)
    (folder / MANIFEST).write_text(dump_json({**content, "sha256": manifest.digest(content)}), encoding="utf-8")
