"""Whether the files of a bundle are there, inside its folder, and those that were written."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from edgediffusion.bundle.records import File
from edgediffusion.errors import BundleError
from edgediffusion.files import sha256

if TYPE_CHECKING:
    from edgediffusion.bundle import Bundle


class Hashes:
    """sha256 of files; one that has several names in a bundle, as weights that graphs share, is read once."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], str] = {}

    def __call__(self, file: Path) -> str:
        stat = file.stat()
        key = (stat.st_dev, stat.st_ino)
        if key not in self._known:
            self._known[key] = sha256(file)
        return self._known[key]


def check_paths(bundle: Bundle) -> None:
    """Refuse a path that leaves the folder, and a file that is used and not listed."""
    named = [c.model for c in bundle.components] + [c.tokenizer.file for c in bundle.components if c.tokenizer]
    for name in [*named, *bundle.files]:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\\" in name or not name:
            raise BundleError(f"The bundle '{bundle.path}' names a path that leaves its folder", got=repr(name), do="Do not use it.")
        if name not in bundle.files:
            raise BundleError(f"The bundle '{bundle.path}' uses a file that its manifest does not list", got=repr(name))
        file = bundle.path / name
        if file.exists() and not file.resolve().is_relative_to(bundle.path.resolve()):
            raise BundleError(f"The bundle '{bundle.path}' has a link that leaves its folder", got=repr(name), do="Do not use it.")


def check_files(bundle: Bundle, skip: str, *, verify: bool) -> None:
    """Refuse files that are missing, of another size, or with ``verify`` of another hash; not those whose path begins with ``skip``."""
    looked_at = {name: stated for name, stated in bundle.files.items() if not (skip and name.startswith(skip))}
    for name in looked_at:
        if not (bundle.path / name).is_file():
            raise BundleError(f"The bundle '{bundle.path}' lacks the file '{name}'", do=_mend(bundle, name))
    hashes = Hashes()
    for name, stated in looked_at.items():
        if _changed(bundle.path / name, stated, hashes if verify else None):
            raise BundleError(f"The file '{name}' of the bundle '{bundle.path}' was changed after it was written", do=_mend(bundle, name))


def damaged(bundle: Bundle, prefix: str) -> tuple[str, ...]:
    """The files whose path begins with ``prefix`` that are missing or not what was written."""
    hashes, named = Hashes(), sorted(name for name in bundle.files if name.startswith(prefix))
    return tuple(name for name in named if _changed(bundle.path / name, bundle.files[name], hashes))


def _changed(file: Path, stated: File, hashes: Hashes | None) -> bool:
    if not file.is_file() or file.stat().st_size != stated.bytes:
        return True
    return hashes is not None and hashes(file) != stated.sha256


def _mend(bundle: Bundle, name: str) -> str:
    folder, *rest = PurePosixPath(name).parts
    if folder != "engines" or not rest:
        return "Make the bundle again."
    return f"Build its engines anew: edgediffusion build {bundle.path} --target {rest[0]} -o NEW, or in their place with --rebuild."
