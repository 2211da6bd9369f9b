"""Peak memory of a whole generation, measured where nothing else was ever loaded: in a fresh interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass

from edgediffusion.bundle import Bundle
from edgediffusion.errors import EngineError

_WORKER = """
import json, sys, time
started = time.perf_counter()
from edgediffusion.runtimes import Pipeline
from edgediffusion.runtimes.any_picture import any_picture
import edgediffusion.runtimes.pipeline
def peak():
    if not sys.platform.startswith("linux"):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    # On Linux getrusage's maximum begins with that of the process that started this one.
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
before, asked = peak(), json.loads(sys.argv[1])
pipeline = Pipeline.from_bundle(asked["bundle"], target=asked["target"], threads=asked["threads"], cache=asked["cache"])
loaded = time.perf_counter()
pipeline(**any_picture(pipeline.bundle), num_inference_steps=asked["steps"])
print(json.dumps({"before": before, "peak": peak(), "load_s": loaded - started, "run_s": time.perf_counter() - loaded}))
"""


@dataclass(frozen=True)
class Memory:
    """Peak resident bytes of a process that draws one picture, and what the interpreter and NumPy alone take of it.

    ``load_s`` runs from the first import to the loaded pipeline, ``run_s`` is the picture.
    """

    peak_bytes: int
    before_bytes: int
    load_s: float
    run_s: float


def measure(bundle: Bundle, *, target: str | None = None, steps: int = 2, threads: int | None = None, cache: str | None = None) -> Memory:
    """Draw one picture in a new process, with a caching policy if one is given, and read its high-water mark.

    Raises:
        EngineError: the process failed; its last line of output is quoted.
    """
    asked = json.dumps({"bundle": str(bundle.path), "target": target, "steps": steps, "threads": threads, "cache": cache})
    done = subprocess.run(
        [sys.executable, "-c", _WORKER, asked], capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"}
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise EngineError("The process that measures memory failed", got=last)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return Memory(found["peak"], found["before"], found["load_s"], found["run_s"])
