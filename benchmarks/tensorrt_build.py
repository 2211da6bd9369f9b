"""What building engines for RTX GPUs takes, on a machine without one: python benchmarks/tensorrt_build.py [--sd15 FOLDER]

Every component of the shipped pipelines in float16 and, of the denoisers, int8 and fp8, for three compute capabilities; two rows.
With --sd15 also a UNet of Stable Diffusion 1.5's shape in float16 and int8, 64 x 64 latents: FOLDER is one in which ``python
benchmarks/sd15.py --parts make --folder FOLDER`` made the pipeline. Each build in a process of its own, so that its peak memory is its own.

Ranges of int8 and fp8 are made up: which kernels are built does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from _report import REFERENCE, RESULTS, save

from edgediffusion import text
from edgediffusion.bundle import Bundle
from edgediffusion.errors import EngineError
from edgediffusion.registry import find
from edgediffusion.runtimes.sizes import parse_sizes

GPUS = ("8.6", "8.9", "12.0")
LATENTS = {"reference": 8, "sd15": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sd15", type=Path, help="a folder in which benchmarks/sd15.py made its pipeline")
    parser.add_argument("--only-sd15", action="store_true", help="leave the shipped pipelines out")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(_build(**json.loads(given.one))))
        return
    file = RESULTS / "tensorrt_build.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found.pop("made_by", None)
    with tempfile.TemporaryDirectory(prefix="rtx-") as temporary:
        if not given.only_sd15:
            found["reference"] = [_in_process(**job, latents=8) for job in _reference(Path(temporary))]
        if given.sd15:
            found["sd15"] = [_in_process(**job, latents=64) for job in _sd15(given.sd15, Path(temporary))]
    save("tensorrt_build", found)
    head = ("graph", "format", "GPU", "seconds", "of processor", "engine MB", "peak MB")
    for name, rows in found.items():
        print(f"\n{name}\n" + text.table(head, [tuple(row.values()) for row in rows]))


def _reference(folder: Path) -> list[dict[str, Any]]:
    """The graphs of the shipped pipelines, exported and quantized, as jobs."""
    from edgediffusion.export import export

    jobs = []
    for name in ("fashion", "fashion-dit"):
        half = export(REFERENCE / name, folder / name, dtype="float16")
        jobs += [{"file": half.path / c.model, "name": f"{name} {c.name}", "format": "float16"} for c in half.components]
        jobs += [_quantized(half, folder / f"{name}-{recipe}", recipe, name) for recipe in ("int8", "fp8")]
    return [{**job, "gpu": gpu} for job in jobs for gpu in GPUS]


def _sd15(folder: Path, temporary: Path) -> list[dict[str, Any]]:
    from edgediffusion.export import export

    half = export(folder / "source", temporary / "sd15", dtype="float16")
    unet = half.component("unet")
    jobs = [{"file": half.path / unet.model, "name": "SD 1.5 UNet", "format": "float16"}]
    jobs.append(_quantized(half, temporary / "sd15-int8", "int8", "SD 1.5"))
    return [{**job, "gpu": gpu} for job in jobs for gpu in GPUS]


def _quantized(bundle: Bundle, output: Path, recipe: str, name: str) -> dict[str, Any]:
    from edgediffusion.optimize import QuantizationState, quantize
    from edgediffusion.optimize.graph_file import load_graph
    from edgediffusion.optimize.graph_layers import find_layers
    from edgediffusion.optimize.recipe import load_recipe
    from edgediffusion.optimize.state import LayerState, weights_digest

    (component,) = bundle.with_role("denoise")
    layers = {}
    for layer in find_layers(load_graph(bundle.path / component.model).graph):
        weight = layer.weight.const_value.numpy()
        weight = weight.T if layer.turned else weight
        inputs, outputs = np.ones(weight.shape[1] * layer.groups, np.float32), np.ones(len(weight), np.float32)
        amax = np.abs(weight.astype(np.float32)).reshape(len(weight), -1).max(1)
        layers[f"{component.name}/{layer.name}"] = LayerState(inputs, -4 * inputs, 4 * inputs, -4 * outputs, 4 * outputs, amax)
    state = QuantizationState(weights_digest(bundle, component), {}, layers, asdict(load_recipe(recipe)))
    made = quantize(bundle, state, output, target="rtx-4090")
    return {"file": made.path / component.model, "name": f"{name} {component.name}", "format": recipe}


def _in_process(file: Path, name: str, format: str, gpu: str, latents: int) -> dict[str, Any]:
    job = {"file": str(file), "gpu": gpu, "latents": latents}
    process = subprocess.run([sys.executable, __file__, "--one", json.dumps(job)], stdout=subprocess.PIPE, text=True, check=True)
    row = {"graph": name, "format": format, "gpu": gpu, **json.loads(process.stdout.splitlines()[-1])}
    print(row, flush=True)
    return row


def _build(file: str, gpu: str, latents: int) -> dict[str, Any]:
    """``processor_s`` is what this process and no other took: beside other work it says more than ``seconds``."""
    sizes = parse_sizes(f"batch=2,height={latents},width={latents},image_height={8 * latents},image_width={8 * latents}")
    with tempfile.TemporaryDirectory(prefix="rtx-") as folder:
        engine = Path(folder) / "engine"
        started, processor = time.perf_counter(), time.process_time()
        try:
            find("runtimes.engines", "tensorrt-rtx").build(Path(file), engine, compute_capabilities=(gpu,), shapes=sizes)
        except EngineError:
            return {"seconds": "refused", "processor_s": "", "engine_mb": "", "peak_mb": ""}
        seconds, processor = time.perf_counter() - started, time.process_time() - processor
        size = os.path.getsize(engine)
    peak = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return {
        "seconds": round(seconds, 1),
        "processor_s": round(processor, 1),
        "engine_mb": round(size / 1e6, 1),
        "peak_mb": round(peak / 1e3),
    }


if __name__ == "__main__":
    main()
