"""Make a kit: a bundle with all that a device needs to build its engines itself. ``runtimes/kit`` is what runs there."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgediffusion import __version__, targets
from edgediffusion.bundle import Bundle
from edgediffusion.errors import ArgumentError
from edgediffusion.export.kit_golden import write_golden
from edgediffusion.export.kit_wheel import write_wheel
from edgediffusion.export.lower import lower
from edgediffusion.files import new_file, sha256
from edgediffusion.registry import find
from edgediffusion.runtimes.kit import BUNDLE, DOOR, MANIFEST, Golden, Kit, door, write_manifest
from edgediffusion.runtimes.onnx_header import read_header
from edgediffusion.runtimes.sizes import Sizes, axes_of, parse_sizes, ranges_for, usual_sizes
from edgediffusion.targets import Target

Progress = Callable[[str, float], None]
_REFUSED = ("fp8", "fp4")  # formats that a graph has by intention only
_README = """A kit for {target}: {summary}.

    tar xf {name}          on that device
    cd {stem}
    python3 {door}           checks the device, builds, verifies, measures, and writes the bundle 'built'

It needs Python 3.10 with NumPy, the device's own {engine}, and no network.
"""


@dataclass(frozen=True)
class MadeKit:
    """``golden`` says for each component what it was computed in and how far an engine may be off."""

    path: Path
    bytes: int
    sha256: str
    target: str
    opset: int
    golden: dict[str, Golden]


def kit(
    bundle: Bundle,
    output: str | Path,
    *,
    target: str,
    shapes: str | Sizes = "",
    progress: Progress = lambda label, part: None,
) -> MadeKit:
    """Write ``output``, a tar from which the device ``target`` builds engines of ``bundle`` by itself.

    Graphs are lowered to what the target's engine reads. ``shapes`` are ranges of sizes to build for, as in ``build``. The same bundle and
    package give the same bytes.

    Raises:
        UnknownName: no such target. ArgumentError: engines for it are built here, its engine cannot run the bundle's number formats, the
        bundle was quantized for another engine, a graph cannot be lowered, or shapes that no graph has.
        EngineError: a graph has axes without sizes, or cannot be run here. OutputError: ``output`` exists or cannot be written.
        MissingExtra: a library of the extra ``export`` is not installed.
    """
    device, output = targets.load(target), Path(output)
    sizes = _sizes(bundle, shapes)
    _check(bundle, device)
    with new_file(output) as file, _staging(output) as folder:
        lowered = lower(bundle, folder / BUNDLE, target=target, progress=_part(progress, 0.0, 0.2))
        golden = write_golden(bundle, folder, sizes, _part(progress, 0.2, 0.7))
        progress("the package", 0.7)
        wheel = write_wheel(folder)
        shutil.copyfile(str(door.__file__), folder / DOOR)
        words = {"target": device.name, "summary": device.summary, "engine": device.engines[0], "door": DOOR}
        (folder / "README.txt").write_text(_README.format(**words, name=output.name, stem=output.stem), encoding="utf-8")
        write_manifest(Kit(folder, __version__, device, lowered.digest, wheel, sizes, golden, {}))
        _write_tar(folder, file, output.stem, _part(progress, 0.75, 1.0))
        made = MadeKit(output, file.stat().st_size, sha256(file), device.name, lowered.history[-1].arguments["opset"], golden)
    progress("done", 1.0)
    return made


@contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A folder beside the tar, so that weights can be linked; one that a killed run left goes with the next run's (``files``)."""
    folder = output.parent / f".{output.stem}.kit.partial-{os.getpid()}"
    try:
        folder.mkdir(parents=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sizes(bundle: Bundle, shapes: str | Sizes) -> Sizes:
    """Of the axes that the graphs have; parts of others (``height/2``) follow from these."""
    asked = parse_sizes(shapes) if isinstance(shapes, str) and shapes else dict(shapes or {})
    known = axes_of([spec for c in bundle.components for spec in c.inputs])
    if unknown := [axis for axis in asked if axis not in known]:
        raise ArgumentError("No graph of the bundle has such an axis", got=", ".join(unknown), allowed=", ".join(known) or "none")
    sizes = {**usual_sizes(bundle), **asked}
    for component in bundle.components:
        ranges_for(component.inputs, sizes, component.name)
    return sizes


def _check(bundle: Bundle, device: Target) -> None:
    """Refuse what the device would refuse, or fail at, after it was carried there."""
    if device.ahead:
        raise ArgumentError(
            f"Engines for '{device.name}' are built where the bundle is, and need no kit",
            do=f"Build them: edgediffusion build {bundle.path} --target {device.name} -o NEW",
        )
    made = next((verb.arguments for verb in reversed(bundle.history) if verb.name == "quantize"), {})
    placement = made.get("placement") or (made and targets.load(str(made.get("target", ""))).placement)
    if made and placement != device.placement:
        raise ArgumentError(
            f"The bundle was quantized for another engine than that of '{device.name}'",
            got=f"placement '{placement}'",
            allowed=f"placement '{device.placement}'",
            do=f"Quantize the float bundle for it: edgediffusion quantize BUNDLE --state STATE --target {device.name} -o NEW",
        )
    for component in bundle.components:
        _check_formats(component.name, bundle.path / component.model, device)


def _check_formats(name: str, model: Path, device: Target) -> None:
    header = read_header(model)
    lacking = [f for f in header.formats if f in _REFUSED and f not in device.formats]
    if hasattr(find("runtimes.engines", device.engines[0]), "compute_capability"):  # its networks are typed as the file says
        lacking += sorted({s.dtype for s in header.outputs if s.dtype.startswith("float")} - set(device.formats))
    if lacking:
        raise ArgumentError(
            f"The target '{device.name}' has no kernels for what '{name}' is computed in",
            got=", ".join(lacking),
            allowed=", ".join(device.formats),
            do="Quantize it by another recipe, as int8, or export it in a float format that the target has.",
        )


def _write_tar(folder: Path, file: Path, stem: str, progress: Progress) -> None:
    """Sorted names, one time, nobody's: the same kit is the same bytes. A file that is linked in the bundle is stored once."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    names.sort(key=lambda name: (name != DOOR, name != MANIFEST))  # what tells of the rest comes first
    stored: dict[tuple[int, int], str] = {}
    total, done = sum((folder / name).stat().st_size for name in names) or 1, 0
    with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in names:
            progress("writing", done / total)
            stat = (folder / name).stat()
            entry = tarfile.TarInfo(f"{stem}/{name}")
            entry.mode = 0o755 if name == DOOR else 0o644
            earlier = stored.setdefault((stat.st_dev, stat.st_ino), entry.name)
            if earlier != entry.name:
                entry.type, entry.linkname = tarfile.LNKTYPE, earlier
                tar.addfile(entry, io.BytesIO())
                continue
            entry.size = stat.st_size
            with open(folder / name, "rb") as stream:
                tar.addfile(entry, stream)
            done += stat.st_size


def _part(progress: Progress, begin: float, end: float) -> Progress:
    return lambda label, part: progress(label, begin + (end - begin) * part)
