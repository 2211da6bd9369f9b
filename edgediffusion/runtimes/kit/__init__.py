"""A kit: a folder, carried as a tar, from which a device builds its own engines; ``export/kit.py`` makes it, ``docs/kit.md`` tells of it.

    build_here.py                   what is started there: a door that unpacks the wheel and calls ``steps`` (door.py)
    kit.json                        what the kit is for, what each component should give, the sha256 of every file
    edgediffusion-*.whl             this package
    bundle/                         graphs that the target's engine reads, weights, tokenizers, the bundle's manifest
    golden/<component>.npz          inputs of one call (``in.<name>``) and what the graph gave for them on a processor (``out.<name>``)

The files here, in the order of the steps that a device takes:

    machine.py    what the device is, from its files
    checks.py     whether that will do: every wrong fact at once, each with what to do
    build.py      engines, one component at a time, each in a process of its own
    verify.py     engines against the golden outputs, and how long a call takes
    results.py    the bundle with its engines and what was found
    worker.py     what runs in those processes
    steps.py      all of it, from where the last run stopped
    door.py       build_here.py

Nothing here prints, and nothing needs more than Python 3.10, NumPy and the target's engine library.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any

from edgediffusion.bundle import Bundle, File
from edgediffusion.errors import BundleError
from edgediffusion.files import dump_json, sha256
from edgediffusion.runtimes.sizes import SizeRange
from edgediffusion.targets import Fact, Target

FORMAT = 1
MANIFEST = "kit.json"
DOOR = "build_here.py"
BUNDLE = "bundle"
GOLDEN = "golden"
Progress = Callable[[str, float], None]
_COPY = "Copy the kit to this machine again, and unpack it with: tar xf KIT.tar"


@dataclass(frozen=True)
class Golden:
    """What one component should give: ``tolerance`` bounds |y - r| / |r| over its outputs together, for an engine of ``precision``."""

    file: str
    precision: str
    tolerance: float


@dataclass(frozen=True)
class Kit:
    """An unpacked kit. ``shapes`` are the ranges of sizes to build for, by the names of axes; ``digest`` is that of its bundle."""

    path: Path
    version: str
    target: Target
    digest: str
    wheel: str
    shapes: Mapping[str, SizeRange]
    golden: Mapping[str, Golden]
    files: Mapping[str, File]

    @classmethod
    def open(cls, path: Path) -> Kit:
        """Read ``kit.json``; ``damaged`` compares the files.

        Raises:
            BundleError: there is none, it is damaged or newer than this package, or names paths outside the kit.
        """
        content = _read(path)
        try:
            kit = cls(
                path=path,
                version=str(content["version"]),
                target=_target(content["target"]),
                digest=str(content["digest"]),
                wheel=str(content["wheel"]),
                shapes={axis: SizeRange(*sizes) for axis, sizes in content["shapes"].items()},
                golden={name: Golden(**golden) for name, golden in content["golden"].items()},
                files={name: File(**file) for name, file in content["files"].items()},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"'{path / MANIFEST}' lacks or misstates a field: {error}", do=_COPY) from None
        for name in (kit.wheel, *kit.files, *(golden.file for golden in kit.golden.values())):
            pure = PurePosixPath(name)
            if pure.is_absolute() or ".." in pure.parts or not name or name not in kit.files:
                raise BundleError(f"The kit '{path}' names a file that is not in it", got=repr(name), do="Do not use it.")
        return kit

    def damaged(self, progress: Progress = lambda label, part: None) -> tuple[str, ...]:
        """What is wrong with the kit's files, a line each; nothing where all are there and have the bytes that they had."""
        total, done, found = sum(file.bytes for file in self.files.values()) or 1, 0, []
        for name, stated in self.files.items():
            progress("reading the kit", done / total)
            done += stated.bytes
            file = self.path / name
            if not file.is_file():
                found.append(f"'{name}' is missing")
            elif file.stat().st_size != stated.bytes:
                found.append(f"'{name}' has {file.stat().st_size} bytes, not {stated.bytes}")
            elif sha256(file) != stated.sha256:
                found.append(f"'{name}' has other bytes than it had")
        return tuple(found)

    def bundle(self) -> Bundle:
        """The bundle in the kit. Its files are ``damaged``'s to compare.

        Raises:
            BundleError: it is damaged, or not the one that the kit was made of.
        """
        bundle = Bundle.open(self.path / BUNDLE, verify=False)
        if bundle.digest != self.digest:
            raise BundleError("The kit's bundle is not the one that it was made of", do=_COPY)
        return bundle

    @property
    def engine(self) -> str:
        return self.target.engines[0]


def write_manifest(kit: Kit) -> None:
    """Finish the folder of a kit, whose other files are in place: hash them and write ``kit.json``; ``kit.files`` are not read."""
    names = sorted(p.relative_to(kit.path).as_posix() for p in kit.path.rglob("*") if p.is_file() and p.name != MANIFEST)
    known: dict[tuple[int, int], str] = {}
    files = {}
    for name in names:
        stat = (kit.path / name).stat()
        key = (stat.st_dev, stat.st_ino)
        known[key] = known.get(key) or sha256(kit.path / name)
        files[name] = File(known[key], stat.st_size)
    kit = replace(kit, files=files)
    content = {
        "format": FORMAT,
        **{f.name: getattr(kit, f.name) for f in fields(kit) if f.name not in ("path", "target", "shapes", "golden", "files")},
        "target": asdict(kit.target),
        "shapes": {axis: [size.smallest, size.usual, size.largest] for axis, size in kit.shapes.items()},
        "golden": {name: asdict(golden) for name, golden in kit.golden.items()},
        "files": {name: asdict(file) for name, file in kit.files.items()},
    }
    (kit.path / MANIFEST).write_text(dump_json({**content, "sha256": _digest(content)}), encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise BundleError(
            f"'{path}' is no kit: it has no {MANIFEST}", do=f"Run {DOOR} in the folder that the tar was unpacked to."
        ) from None
    except ValueError as error:
        raise BundleError(f"'{file}' is damaged: {error}", do=_COPY) from None
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise BundleError(f"'{file}' is damaged: it states no format number", do=_COPY)
    if content["format"] > FORMAT:
        raise BundleError(
            f"The kit '{path}' is newer than the package in it", got=f"format {content['format']}", allowed=str(FORMAT), do=_COPY
        )
    stated = content.pop("sha256", None)
    if stated != _digest(content):
        raise BundleError(f"'{file}' was changed after it was written: its own sha256 does not fit", do=_COPY)
    return content


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(dump_json(content).encode()).hexdigest()


def _target(content: Mapping[str, Any]) -> Target:
    """A target from what ``asdict`` and JSON made of it: lists are tuples again."""
    plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}
    plain["facts"] = tuple(Fact(**fact) for fact in content["facts"])
    return Target(**plain)
