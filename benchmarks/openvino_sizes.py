"""What OpenVINO's kernels for known sizes save, and what loading takes: python benchmarks/openvino_sizes.py BUNDLE [NAME=BUNDLE ...]

For the denoiser of each bundle, one step at two rows and the bundle's own size: the model compiled for any sizes beside the one for these,
as the engine builds them, and ONNX Runtime's engine; float32 and, with --bfloat16, that too. Loading: the ONNX file compiled anew beside
the compiled model. The variants take turns, so that what disturbs one disturbs all; medians of --runs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from _report import save

from edgediffusion import text
from edgediffusion.bundle import Bundle
from edgediffusion.registry import find
from edgediffusion.runtimes.sizes import Sizes, usual_sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", metavar="[NAME=]BUNDLE")
    parser.add_argument("--bfloat16", action="store_true", help="build for it too, where this processor has it")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    rows = []
    for entry in given.bundles:
        name, _, path = entry.rpartition("=")
        rows += measured(name or Path(path).name, Bundle.open(path), given.bfloat16, given.runs, given.threads)
    save("openvino_sizes", {"runs": given.runs, "threads": given.threads, "rows": rows})
    print(text.table(list(rows[0]), [tuple(row.values()) for row in rows]))


def measured(name: str, bundle: Bundle, bfloat16: bool, runs: int, threads: int | None) -> list[dict[str, Any]]:
    (component,) = bundle.with_role("denoise")
    sizes = usual_sizes(bundle)
    axes = {axis: size.usual for axis, size in sizes.items()}
    model = bundle.path / component.model
    with tempfile.TemporaryDirectory(prefix="openvino-") as folder:
        loads = _engines(model, sizes, Path(folder), bfloat16, threads)
        loading = {variant: _timed(load) for variant, load in loads.items()}
        bindings = {variant: load().bind(axes) for variant, load in loads.items()}
        times: dict[str, list[float]] = {variant: [] for variant in bindings}
        for binding in bindings.values():
            _fill(binding.inputs)
            binding.run()
        for _ in range(runs):
            for variant, binding in bindings.items():
                times[variant].append(_timed(binding.run))
    return [
        {
            "bundle": name,
            "engine": variant,
            "median_ms": round(1e3 * float(np.median(t)), 2),
            "min_ms": round(1e3 * min(t), 2),
            "load_s": round(loading[variant], 2),
        }
        for variant, t in times.items()
    ]


def _engines(model: Path, sizes: Sizes, folder: Path, bfloat16: bool, threads: int | None) -> dict[str, Callable[[], Any]]:
    openvino, onnxruntime = (find("runtimes.engines", name) for name in ("openvino", "onnxruntime"))
    found: dict[str, Callable[[], Any]] = {}
    try:
        onnxruntime.build(model, folder / f"unet{onnxruntime.suffix}", threads=threads)
        found["ONNX Runtime"] = lambda: onnxruntime.open_session(folder / f"unet{onnxruntime.suffix}", threads=threads)
    except Exception as error:
        print(f"ONNX Runtime left out: {error}")
    found["OpenVINO, ONNX file"] = lambda: openvino.open_session(model, threads=threads)
    for precision in ("float32", "bfloat16")[: 1 + bfloat16]:
        for label, shapes in (("any sizes", None), ("known sizes", sizes)):
            file = folder / f"{precision}-{label[:3]}{openvino.suffix}"
            openvino.build(model, file, threads=threads, precision=precision, shapes=shapes)
            found[f"OpenVINO {precision}, {label}"] = lambda file=file: openvino.open_session(file, threads=threads)
    return found


def _fill(inputs: Mapping[str, np.ndarray]) -> None:
    for seed, (name, array) in enumerate(inputs.items()):
        array[...] = 500 if name == "timestep" else np.random.default_rng(seed).standard_normal(array.shape)


def _timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
