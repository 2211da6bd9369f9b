"""Finished parts of a long piece of work, kept on disk so that a run that was stopped can go on from them.

A part is a file of named arrays: 64 hexadecimal digits of a sha256, then NumPy's ``.npz`` format, which the digest is
of. What is damaged is as good as absent. Parts lie beside the file that the work is for, in a folder that goes when
that file is written; within it, in one folder for each setting of the work, so that another setting starts anew.
"""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgediffusion.errors import Cancelled
from edgediffusion.files import dump_json, new_file

_DIGITS = 64
_SUFFIX = ".part"


@contextmanager
def beside(output: Path) -> Iterator[Path]:
    """The folder for parts of the work that writes ``output``; it is made when the first part is.

    It is removed when the block ends well, and stays when it does not, unless it has no parts.

    Raises:
        Cancelled: Ctrl-C, in place of KeyboardInterrupt, where there are parts to go on from.
    """
    folder = output.parent / f".{output.name}.parts"
    try:
        yield folder
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException as error:
        if not any(folder.rglob(f"*{_SUFFIX}")):
            shutil.rmtree(folder, ignore_errors=True)
        elif isinstance(error, KeyboardInterrupt):
            raise Cancelled("Stopped. What was done so far is kept", do="The same command goes on from it.") from None
        raise


@dataclass(frozen=True)
class Parts:
    """Parts of one setting. Without a folder nothing is kept and nothing found."""

    folder: Path | None

    @classmethod
    def of(cls, folder: Path | None, setting: Mapping[str, object]) -> Parts:
        """``setting`` is all that the contents of the parts depend on, as plain data."""
        return cls(None if folder is None else folder / hashlib.sha256(dump_json(setting).encode()).hexdigest()[:16])

    def write(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep a part. Raises OutputError: the disk is full."""
        if self.folder is None:
            return
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]  # its flag allow_pickle is no array
        content = buffer.getvalue()
        with new_file(self.folder / f"{name}{_SUFFIX}", replace=True) as partial:
            partial.write_bytes(hashlib.sha256(content).hexdigest().encode() + content)

    def read(self, name: str) -> dict[str, np.ndarray] | None:
        """A part as it was written, or None if there is none or it is damaged."""
        if self.folder is None or not (file := self.folder / f"{name}{_SUFFIX}").is_file():
            return None
        digest, content = (whole := file.read_bytes())[:_DIGITS], whole[_DIGITS:]
        if digest != hashlib.sha256(content).hexdigest().encode():
            return None
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return dict(arrays)
