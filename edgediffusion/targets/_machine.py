"""What this machine is, from files that every Linux has and from NVIDIA's driver; no engine library is loaded for it.

``this_machine`` takes the root of the file system and a way to run a program, so that a recorded machine can stand for a real one.
"""

from __future__ import annotations

import ctypes
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

_ARCHITECTURES = {"x86_64": "x86-64", "amd64": "x86-64", "aarch64": "arm64", "arm64": "arm64"}
_SYSTEMS = {"Linux": "linux", "Windows": "windows", "Darwin": "macos"}
_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,compute_cap,driver_version", "--format=csv,noheader,nounits")
_MIB = 1 << 20
_INTEL = "0x8086"
_CC_MAJOR, _CC_MINOR = 75, 76  # CUdevice_attribute: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


@dataclass(frozen=True)
class Device:
    """An accelerator, by the name that the system has for it. Empty or 0: the system does not tell."""

    name: str
    memory_gb: float = 0.0
    compute_capability: str = ""
    driver: str = ""

    def is_called(self, expression: str) -> bool:
        return re.fullmatch(expression, self.name) is not None


@dataclass(frozen=True)
class Machine:
    """``release`` is that of a Jetson's system software: ``R36.4.3``."""

    architecture: str
    system: str
    devices: tuple[Device, ...]
    release: str = ""


def this_machine(root: Path = Path("/"), run: Callable[[Sequence[str]], str] | None = None) -> Machine:
    """The machine with its accelerators: a Jetson by its device tree, other NVIDIA GPUs by nvidia-smi or else the driver's library,
    Intel's by the kernel's list of devices. The first is the one to build for."""
    asked = run or _run
    jetson = _text(root / "proc/device-tree/model").strip("\0\n ")
    if "Jetson" in jetson:
        devices: tuple[Device, ...] = (Device(jetson, _memory_gb(root)),)
    else:
        devices = _nvidia_smi(asked(_QUERY)) or (() if run else cuda_devices())
        devices = tuple(d if d.memory_gb else _with_memory(d, root) for d in devices) or _intel(root)
    return Machine(
        architecture=_ARCHITECTURES.get(platform.machine().lower(), platform.machine()),
        system=_SYSTEMS.get(platform.system(), platform.system()),
        devices=devices,
        release=_release(_text(root / "etc/nv_tegra_release")),
    )


def _nvidia_smi(answer: str) -> tuple[Device, ...]:
    """``NVIDIA GeForce RTX 4090, 24564, 8.9, 570.86.10``; a GPU that shares memory answers ``[N/A]`` for it."""
    found = []
    for line in answer.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 4 and parts[0]:
            gb = float(parts[1]) * _MIB / 2**30 if re.fullmatch(r"\d+", parts[1]) else 0.0
            found.append(Device(parts[0], gb, parts[2] if re.fullmatch(r"\d+\.\d+", parts[2]) else "", parts[3]))
    return tuple(found)


def _with_memory(device: Device, root: Path) -> Device:
    return Device(device.name, _memory_gb(root), device.compute_capability, device.driver)


def _memory_gb(root: Path) -> float:
    """What the kernel has, which is a little less than what is soldered: 61.4 of 64."""
    found = re.search(r"^MemTotal:\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    return int(found[1]) / 2**20 if found else 0.0


def _release(text: str) -> str:
    """``# R36 (release), REVISION: 4.3, ...`` to ``R36.4.3``."""
    found = re.search(r"# (R\d+) \(release\), REVISION: ([\d.]+)", text)
    return f"{found[1]}.{found[2]}" if found else ""


def _intel(root: Path) -> tuple[Device, ...]:
    """``Intel GPU``, ``Intel NPU``: a graphics card or an accelerator (which is what the kernel calls an NPU) of Intel's."""
    found = []
    for name, pattern in (("Intel GPU", "sys/class/drm/renderD*/device/vendor"), ("Intel NPU", "sys/class/accel/accel*/device/vendor")):
        if any(_text(file).strip() == _INTEL for file in sorted(root.glob(pattern))):
            found.append(Device(name))
    return tuple(found)


def cuda_devices() -> tuple[Device, ...]:
    """By the driver's own library, where nvidia-smi is not installed (containers, some Jetsons); () where there is no driver."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1")
    except OSError:
        return ()
    count, name, memory, value = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    found = []
    for index in range(count.value):
        device = ctypes.c_int()
        if cuda.cuDeviceGet(ctypes.byref(device), index) or cuda.cuDeviceGetName(name, len(name), device):
            continue
        cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        version = []
        for attribute in (_CC_MAJOR, _CC_MINOR):
            cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            version.append(str(value.value))
        found.append(Device(name.value.decode(errors="replace"), memory.value / 2**30, ".".join(version)))
    return tuple(found)


def _run(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
