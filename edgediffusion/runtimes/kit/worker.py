"""One piece of work in a process of its own: all that it took is given back when it ends, and if the system kills it, it alone is gone.

    python -m edgediffusion.runtimes.kit.worker JOB

JOB is JSON with the name of a function below and its arguments. Each line of standard output is an object: ``{"label", "part"}`` while it
works, ``{"done": result}`` or ``{"refused": message}`` at its end. ``ask`` starts one and reads these.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

import edgediffusion
from edgediffusion.bundle import Bundle
from edgediffusion.errors import EdgeDiffusionError, EngineError
from edgediffusion.registry import find
from edgediffusion.runtimes.graph import Graph
from edgediffusion.runtimes.kit import Progress
from edgediffusion.runtimes.sizes import SizeRange

_STOPPED = (-9, 137)  # by the system, as it does when memory runs out
_PATIENCE_S = 10.0  # for a worker that was told to end


def ask(job: Mapping[str, Any], progress: Progress, *, watch: Callable[[], None] = lambda: None) -> Any:
    """Run a job in a new process; ``watch`` is called at each line it says. Whatever is raised meanwhile, Ctrl-C too, ends the process.

    Raises:
        EngineError: what the job was refused with; or the process was killed, or ended without a word.
    """
    home = str(Path(edgediffusion.__file__).parent.parent)
    paths = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(job)], stdout=subprocess.PIPE, stderr=complaints, text=True, env=environment
        )
        try:
            said = _listen(process, progress, watch)
        finally:
            _end(process)
        if "done" in said:
            return said["done"]
        complaints.seek(0)
        lines = complaints.read().decode(errors="replace").strip().splitlines()
    if process.returncode in _STOPPED:
        raise EngineError(
            f"The system ended the work on '{job['component']}': it ran out of memory",
            do="Close what is not needed, add swap on a disk, or give a smaller --workspace-mb. What is built is kept.",
        )
    if "refused" not in said:
        raise EngineError(
            f"The work on '{job['component']}' ended without a result", got=lines[-1] if lines else f"exit {process.returncode}"
        )
    raise EngineError(said["refused"])


def _listen(process: subprocess.Popen[str], progress: Progress, watch: Callable[[], None]) -> dict[str, Any]:
    said: dict[str, Any] = {}
    assert process.stdout is not None
    for line in process.stdout:
        with suppress(ValueError):  # a library that prints
            said = json.loads(line)
            watch()
            if "label" in said:
                progress(said["label"], said["part"])
    process.wait()
    return said


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdout is not None:
        process.stdout.close()


def build(
    *, component: str, engine: str, model: str, output: str, options: Mapping[str, Any], shapes: Mapping[str, Any], progress: Progress
) -> dict[str, Any]:
    """Build one engine into the folder ``output``; ``options`` are those of the engine's ``build`` but for shapes and progress."""
    library = find("runtimes.engines", engine)
    every = {
        **options,
        "timing_cache": Path(options["timing_cache"]) if "timing_cache" in options else None,
        "shapes": {axis: SizeRange(*sizes) for axis, sizes in shapes.items()},
        "progress": lambda label, part: progress(f"{component}: {label}", part),
    }
    taken = {name: value for name, value in every.items() if name in getattr(library, "options", ()) and value}
    file, begun = component + library.suffix, time.monotonic()
    library.build(Path(model), Path(output) / file, **taken)
    return {"file": file, "seconds": round(time.monotonic() - begun, 1), "peak_bytes": _peak_bytes()}


def run(*, component: str, engine: str, bundle: str, file: str, golden: str, runs: int, warmup: int, progress: Progress) -> dict[str, Any]:
    """Run an engine on the golden inputs: how far its outputs are off, and the times of ``runs`` calls.

    ``error`` is |y - r| / |r| over the outputs together, ``None`` where they are not finite.
    """
    opened = Bundle.open(bundle, verify=False)
    with np.load(golden) as arrays:
        known = {name: arrays[name] for name in arrays.files}
    progress(f"{component}: loading", 0.0)
    begun = time.perf_counter()
    session = find("runtimes.engines", engine).open_session(Path(file))
    load_ms = 1e3 * (time.perf_counter() - begun)
    feeds = {name[3:]: array for name, array in known.items() if name.startswith("in.")}
    binding = Graph(opened.component(component), session).bind({name: array.shape for name, array in feeds.items()})
    for name, array in feeds.items():
        binding.inputs[name][...] = array
    binding.run()
    error = _error(binding.outputs, {name[4:]: array for name, array in known.items() if name.startswith("out.")})
    times = []
    for at in range(warmup + runs if runs else 0):
        progress(f"{component}: timing", at / (warmup + runs))
        begun = time.perf_counter()
        binding.run()
        times.append(1e3 * (time.perf_counter() - begun))
    return {"error": error, "load_ms": load_ms, "times_ms": times[warmup:], "peak_bytes": _peak_bytes()}


def _error(outputs: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float | None:
    pairs = [(outputs[name].astype(np.float64), array.astype(np.float64)) for name, array in expected.items()]
    square, norm = (sum(float(np.sum(v**2)) for v in values) for values in ((y - r for y, r in pairs), (r for _, r in pairs)))
    error = (square / norm) ** 0.5 if norm else square**0.5
    return error if np.isfinite(error) else None


def _peak_bytes() -> int:
    """The largest resident size of this process; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


JOBS: Mapping[str, Callable[..., dict[str, Any]]] = {"build": build, "run": run}


def main(text: str) -> None:
    last = [0.0]
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")

    def say(**what: Any) -> None:
        out.write(json.dumps(what) + "\n")
        out.flush()

    def progress(label: str, part: float) -> None:
        now = time.monotonic()
        if now - last[0] > 0.2:
            last[0] = now
            say(label=label, part=part)

    job = json.loads(text)
    try:
        say(done=JOBS[job.pop("do")](**job, progress=progress))
    except EdgeDiffusionError as error:
        say(refused=str(error))


if __name__ == "__main__":
    main(sys.argv[1])
