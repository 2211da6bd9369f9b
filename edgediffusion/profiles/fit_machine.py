"""What this machine's processor does, measured in half a second where nothing else was loaded.

A clock says little on a machine that is shared or throttled, and a virtual one does not tell. So one core multiplies matrices and
copies memory, in a process of its own with one thread, and its best times count: what disturbs it makes it slower, never faster.
Products and copies are short, so that some lie between two turns of other programs.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path

from edgediffusion.errors import EngineError
from edgediffusion.targets import Target, this_machine
from edgediffusion.targets.fit import Processor

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "BLIS_NUM_THREADS")
_NAMES = {"avx2": "avx2", "avx512_vnni": "avx512_vnni", "amx_int8": "amx_int8", "asimddp": "asimddp"}  # flags of the kernel: of targets
_WORKER = """
import json, time
import numpy as np
def best(run, seconds):
    end, least = time.perf_counter() + seconds, float("inf")
    while time.perf_counter() < end:
        started = time.perf_counter()
        run()
        least = min(least, time.perf_counter() - started)
    return least
a = np.ones((256, 256), np.float32)
product = 2 * 256**3 / best(lambda: np.matmul(a, a), 0.15)
def copied(buffer, part):
    of, to = (np.ones(buffer, np.uint8) for _ in range(2))
    at, times, end = 0, [], time.perf_counter() + 0.3
    while time.perf_counter() < end:
        started = time.perf_counter()
        to[at : at + part] = of[at : at + part]
        times.append(time.perf_counter() - started)
        at = (at + part) % buffer
    return 2 * part / np.percentile(times, 10)
print(json.dumps({"float32": product, "near": copied(1 << 20, 1 << 18), "far": copied(1 << 27, 1 << 18)}))
"""


@cache
def this_processor() -> Processor:
    """The processor that this process may use: rates of one core, times the cores; memory is one core's, which nearly fills it.

    Raises:
        EngineError: the process that measures failed.
    """
    alone = {**os.environ, **dict.fromkeys(_THREADS, "1")}
    done = subprocess.run([sys.executable, "-c", _WORKER], capture_output=True, text=True, env=alone)
    if done.returncode != 0:
        raise EngineError("The process that measures the processor failed", got=(done.stderr.strip().splitlines() or ["no output"])[-1])
    found = json.loads(done.stdout)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Processor(
        float32=found["float32"] * cores,
        cached_bandwidth=max(found["near"] * cores, found["far"]),
        bandwidth=found["far"],
        memory_bytes=_memory_bytes(),
        instructions=_instructions(),
    )


def processor_of(target: Target) -> Processor | None:
    """What was measured of this machine's processor where it is what the target means; None where the target's own figures count."""
    machine = this_machine()
    known = target.device != "cpu" or (target.peak_tops and target.bandwidth_gb_s)
    if known or target.architecture != machine.architecture or machine.system not in target.systems or target.known_as:
        return None
    return this_processor()


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def _instructions() -> tuple[str, ...]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return ("asimddp",) if platform.machine().lower() in ("arm64", "aarch64") else ("avx2",)
    flags = set(info.read_text(encoding="utf-8", errors="replace").split())
    return tuple(name for flag, name in _NAMES.items() if flag in flags)
