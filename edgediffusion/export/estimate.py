"""What an export will read, write and need, told before it begins: from the headers of the weight files alone.

A graph has about as many nodes as its network has weights, so time and memory go by their number, not by their size.
benchmarks/export_scale.py prints the constants that fit its rows best, and has the estimates beside what was measured.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgediffusion.errors import OutputError
from edgediffusion.text import size

_PART_S, _WEIGHT_S = 1.0, 0.028
_HASHED_BYTES_S, _CONVERTED_BYTES_S, _COPIED_BYTES_S = 0.9e9, 0.4e9, 0.8e9
_IMPORTED_BYTES, _WEIGHT_BYTES, _GRAPH_BYTES = 560e6, 0.11e6, 1800.0


@dataclass(frozen=True)
class Work:
    """One graph: how many weights it has, and the bytes that are written anew for it."""

    weights: int
    converted_bytes: int


@dataclass(frozen=True)
class Estimate:
    """``written_bytes`` are those besides links. ``seconds`` are counted from the end of the imports. ``weights`` is their number."""

    graphs: int
    weights: int
    read_bytes: int
    written_bytes: int
    memory_bytes: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"will read {size(self.read_bytes)}, write {size(self.written_bytes)}, "
            f"need about {size(self.memory_bytes)} of memory and {self.seconds:.0f} s"
        )


def estimate(works: Sequence[Work], files: Sequence[Path], folder: Path, *, link: bool) -> Estimate:
    """For graphs whose weights lie in ``files``; ``folder`` is where they go. Files on another disk cannot be linked."""
    read = sum(file.stat().st_size for file in files)
    here = folder.stat().st_dev
    converted = sum(work.converted_bytes for work in works)
    whole = all(work.converted_bytes for work in works)  # then no file is there as it was
    copied = 0 if whole else sum(f.stat().st_size for f in files if not link or f.stat().st_dev != here)
    weights = [work.weights for work in works]
    tracing = len(works) * _PART_S + sum(weights) * _WEIGHT_S
    moving = converted / _CONVERTED_BYTES_S + (converted / _HASHED_BYTES_S) + copied / _COPIED_BYTES_S
    return Estimate(
        graphs=len(works),
        weights=sum(weights),
        read_bytes=read,
        written_bytes=round(sum(weights) * _GRAPH_BYTES) + converted + copied,
        memory_bytes=round(_IMPORTED_BYTES + max(weights, default=0) * _WEIGHT_BYTES),
        seconds=round(max(tracing, read / _HASHED_BYTES_S) + moving, 1),
    )


def refuse_full_disk(estimated: Estimate, folder: Path) -> None:
    """Raises OutputError: the disk of ``folder`` has no room for what will be written."""
    free = shutil.disk_usage(folder).free
    if estimated.written_bytes > free:
        raise OutputError(
            f"The disk of '{os.path.abspath(folder.parent)}' is too full for this bundle",
            got=f"{size(free)} free",
            allowed=f"{size(estimated.written_bytes)} and more",
            do="Free some space, write to another disk, or take the weights as links: --weights link.",
        )
