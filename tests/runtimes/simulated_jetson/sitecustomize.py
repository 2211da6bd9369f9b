"""Makes this interpreter think that it runs on a Jetson: imported when it starts, where this folder is on its path.

What the machine is, is in the JSON file that SIMULATED_DEVICE names. The driver's library, the processor's name and the room on the disk
are told from it; all else is files under the folder that build_here.py is given as --root, and the modules ``tensorrt`` and ``cuda`` here.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
from types import SimpleNamespace
from typing import Any

if "SIMULATED_DEVICE" in os.environ:
    with open(os.environ["SIMULATED_DEVICE"], encoding="utf-8") as stream:
        device = json.load(stream)

    class Driver:
        """The calls of libcuda that ``targets.cuda_devices`` makes."""

        def cuInit(self, flags: int) -> int:
            return 0

        def cuDeviceGetCount(self, count: Any) -> int:
            count._obj.value = 1
            return 0

        def cuDeviceGet(self, found: Any, index: int) -> int:
            found._obj.value = index
            return 0

        def cuDeviceGetName(self, name: Any, size: int, index: Any) -> int:
            name.value = b"Orin"
            return 0

        def cuDeviceTotalMem_v2(self, memory: Any, index: Any) -> int:
            memory._obj.value = 8 << 30
            return 0

        def cuDeviceGetAttribute(self, value: Any, attribute: int, index: Any) -> int:
            value._obj.value = int(device["compute_capability"].split(".")[attribute - 75])
            return 0

    library = ctypes.CDLL

    def load(name: Any, *rest: Any, **more: Any) -> Any:
        if name != "libcuda.so.1":
            return library(name, *rest, **more)
        if not device["compute_capability"]:
            raise OSError("libcuda.so.1: cannot open shared object file")
        return Driver()

    ctypes.CDLL = load  # type: ignore[assignment, misc]
    platform.machine = lambda: device["machine"]
    if "free_bytes" in device:
        shutil.disk_usage = lambda path: SimpleNamespace(free=device["free_bytes"])  # type: ignore[assignment, return-value]
