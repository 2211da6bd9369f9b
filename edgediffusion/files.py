"""Files written whole or not at all.

A result is made in a temporary place beside its destination and renamed when it is complete; what a killed run left
behind is removed by the next one. A rename within one folder is atomic on every file system we target.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgediffusion.errors import OutputError

_PARTIAL = ".partial-"
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux's renameat2


@contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` when the block ends well, and vanishes when it does not.

    With ``replace`` there may be a folder already: who opens ``path`` finds that one or the new one, each of them whole, and who
    has files of the old one open keeps them.

    Raises:
        OutputError: ``path`` exists, its parent cannot be written, or the disk is full.
    """
    path = Path(os.path.realpath(path)) if replace else Path(path)  # what a link leads to is replaced, and not the link
    if not replace:
        _refuse_existing(path)
    with _friendly(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        partial = path.parent / f".{path.name}{_PARTIAL}{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
    try:
        with _friendly(path):
            partial.mkdir()  # in here: Ctrl-C may come with its next instruction
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    _sync(file)
            if replace and path.is_dir():
                _take_place(partial, path)
            else:
                _refuse_existing(path)
                os.rename(partial, path)
            _sync(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def new_file(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary file that becomes ``path`` when the block ends well. Errors as in ``new_folder``."""
    path = Path(path)
    if not replace:
        _refuse_existing(path)
    with _friendly(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        partial = path.parent / f".{path.stem}{_PARTIAL}{os.getpid()}{path.suffix}"
    try:
        with _friendly(path):
            yield partial
            _sync(partial)
            os.replace(partial, path)
            _sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def link_or_copy(source: Path, target: Path, *, link: bool = True) -> None:
    """Put a file at ``target``: the same bytes on disk where they can be shared, a copy where they cannot."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        try:
            os.link(os.path.realpath(source), target)
            return
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP):
                raise
    shutil.copyfile(source, target)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def dump_json(value: Any) -> str:
    """JSON with sorted keys and a final newline: the same value is always the same bytes."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _digest(file: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    for block in iter(lambda: file.read(1 << 20), b""):
        digest.update(block)
    return digest.hexdigest()


def _refuse_existing(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise OutputError(f"The output '{path}' exists already", do="Choose another name, or remove it first.")


def _take_place(new: Path, old: Path) -> None:
    """Swap two folders in one step where the system can (Linux), in two where it cannot; then the old one is removed."""
    if not _exchange(new, old):
        aside = old.with_name(f".{old.name}.before-{os.getpid()}")
        os.rename(old, aside)
        try:
            os.rename(new, old)
        except OSError:
            os.rename(aside, old)
            raise
        new = aside
    shutil.rmtree(new, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # glibc has it from 2.28 on, a file system need not
    return rename is not None and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def _sweep(path: Path) -> None:
    """Remove what killed runs with this destination left: their process ids are no longer alive."""
    for left in path.parent.glob(f".{glob.escape(path.stem)}*{_PARTIAL}*"):
        pid = left.name.rsplit(_PARTIAL, 1)[1].split(".")[0]
        if pid.isdigit() and int(pid) != os.getpid() and not _alive(int(pid)):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _friendly(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"The disk is full: '{path}' could not be written, and nothing of it was kept",
                do="Free some space, or write to another disk.",
            ) from error
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and path.exists():
            raise OutputError(
                f"The output '{path}' exists already: another process has written it meanwhile", do="Choose another name."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and str(path.parent) in str(error.filename or ""):
            raise OutputError(f"'{path}' cannot be written: {error.strerror}", do="Choose a folder you may write to.") from error
        raise
