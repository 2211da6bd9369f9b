"""What a device is, from files that its system has: memory, swap, power mode, free disk, the engine library.

``look`` takes the root of the file system, so that a recorded device can stand for a real one.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from edgediffusion import targets
from edgediffusion.errors import MissingExtra
from edgediffusion.registry import find
from edgediffusion.targets import Machine


@dataclass(frozen=True)
class Swap:
    """One device of /proc/swaps."""

    name: str
    bytes: int

    @property
    def compressed(self) -> bool:
        """zram: a part of the memory itself, compressed."""
        return "zram" in self.name


@dataclass(frozen=True)
class Facts:
    """``available_bytes`` is what can be had without swapping; ``library`` the engine's version, or empty and ``library_problem`` says why;
    ``runner`` whether cuda-python is there. Empty or 0: the system does not tell."""

    machine: Machine
    compute_capability: str
    memory_bytes: int
    available_bytes: int
    swaps: tuple[Swap, ...]
    power_mode: str
    free_bytes: int
    library: str
    library_problem: str
    runner: bool


def look(engine: str, folder: Path, root: Path = Path("/")) -> Facts:
    """The device as it is now; ``folder`` is where engines will be written."""
    library, problem = _library(engine)
    gpus = [gpu.compute_capability for gpu in targets.cuda_devices() if gpu.compute_capability]
    return Facts(
        machine=targets.this_machine(root),
        compute_capability=gpus[0] if gpus else "",
        memory_bytes=_memory(root, "MemTotal"),
        available_bytes=available_bytes(root),
        swaps=_swaps(root),
        power_mode=_power_mode(root),
        free_bytes=_free(folder),
        library=library,
        library_problem=problem,
        runner=_has("cuda.bindings.runtime"),
    )


def available_bytes(root: Path = Path("/")) -> int:
    """What the kernel says can be had without swapping; on a Jetson the GPU takes from the same memory."""
    return _memory(root, "MemAvailable")


def _library(engine: str) -> tuple[str, str]:
    """The version, or why there is none: a library that is there may lack one of its own."""
    try:
        return str(find("runtimes.engines", engine).version()), ""
    except MissingExtra as error:
        return "", f"no Python module '{error.module}'"
    except (ImportError, OSError, AttributeError) as error:
        return "", f"{type(error).__name__}: {error}"


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _memory(root: Path, what: str) -> int:
    found = re.search(rf"^{what}:\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _swaps(root: Path) -> tuple[Swap, ...]:
    """``/dev/zram0  partition  627008  0  5``: name, type, kB, kB in use, priority; under a line of heads."""
    rows = [line.split() for line in _text(root / "proc/swaps").splitlines()[1:]]
    return tuple(Swap(row[0], int(row[2]) * 1024) for row in rows if len(row) >= 3 and row[2].isdigit())


def _power_mode(root: Path) -> str:
    """What nvpmodel writes down: ``pmode:0000``, and in its configuration ``< POWER_MODEL ID=0 NAME=15W >``. ``nvpmodel -q`` wants root."""
    mode = re.search(r"pmode:(\d+)", _text(root / "var/lib/nvpmodel/status"))
    if mode is None:
        return ""
    models = re.findall(r"^\s*<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", _text(root / "etc/nvpmodel.conf"), re.MULTILINE)
    return next((str(name) for number, name in models if int(number) == int(mode[1])), f"mode {int(mode[1])}")


def _free(folder: Path) -> int:
    place = next(p for p in (folder.resolve(), *folder.resolve().parents) if p.exists())
    return shutil.disk_usage(place).free


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
