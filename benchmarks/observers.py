"""What the two observers of layers cost, whether they see the same, and what is drawn after each: a table, and
results/observers_<pipeline>.json.

    python benchmarks/observers.py BUNDLE [--pipeline fashion] [--samples 128] [--pictures 64]

BUNDLE is the float bundle of the shipped pipeline. Items are drawn once; then each observer makes a state for the recipe int8 in a
fresh process. Time is from the start of its work to the state, the imports before it apart; memory is the process's largest resident
set. PSNR is of the quantized bundles' pictures to the float bundle's, 20 steps, guidance 3.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from _report import REFERENCE, save

from edgediffusion import text
from edgediffusion.bundle import Bundle
from edgediffusion.optimize import QuantizationState, quantize
from edgediffusion.optimize.calibrate import read_prompts
from edgediffusion.optimize.items import Drawing, draw_items
from edgediffusion.profiles.quality import psnr_db
from edgediffusion.runtimes import Pipeline

OBSERVERS = ("torch", "onnxruntime")
WORKER = """
import json, pickle, sys, time
begun = time.perf_counter()
bundle, source, items, output = sys.argv[1:]
from pathlib import Path
from edgediffusion.bundle import Bundle
from edgediffusion.optimize.calibrate import state_of
from edgediffusion.optimize.recipe import load_recipe
import onnx_ir
if source:
    import torch, diffusers, transformers
    from edgediffusion.export.source import Source
    from edgediffusion.optimize import observe
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
with open(items, "rb") as file:
    drawn = pickle.load(file)
started, cpu, before = time.perf_counter(), time.process_time(), peak()
given = Source.open(Path(source)) if source else None
state_of(Bundle.open(bundle), given, drawn, load_recipe("int8"), folder=Path(output).parent).save(Path(output))
print(json.dumps({
    "imports s": started - begun,
    "s": time.perf_counter() - started,
    "processor s": time.process_time() - cpu,
    "imports MB": before / 1e6,
    "peak MB": peak() / 1e6,
    "torch loaded": "torch" in sys.modules,
}))
"""


def observed(bundle: Bundle, source: Path | None, items: Path, output: Path) -> dict[str, Any]:
    arguments = [str(bundle.path), str(source or ""), str(items), str(output)]
    done = subprocess.run([sys.executable, "-c", WORKER, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: round(value, 1) if isinstance(value, float) else value for name, value in found.items()}


def difference(states: dict[str, QuantizationState]) -> dict[str, Any]:
    """Of a range, relative to the layer's largest value; and how many layers got other factors."""
    ours, theirs = (states[name].layers for name in reversed(OBSERVERS))
    assert ours.keys() == theirs.keys()
    parts = ("input_low", "input_high", "output_low", "output_high")
    pairs = [(getattr(ours[n], p), getattr(theirs[n], p)) for n in ours for p in parts]
    apart = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs]
    other = sum(not np.allclose(ours[n].factors, theirs[n].factors, rtol=1e-3) for n in ours)
    return {"layers": len(ours), "largest relative difference": max(apart), "layers with other factors": other}


def pictures(bundle: Bundle, prompts: list[str]) -> np.ndarray:
    pipeline, found = Pipeline.from_bundle(bundle), []
    for start in range(0, len(prompts), 8):
        found.append(pipeline(prompts[start : start + 8], num_inference_steps=20, guidance_scale=3.0, seed=start).pixels)
    return np.concatenate(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":", 1)[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--pipeline", default="fashion", help="the shipped one that BUNDLE was exported from")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--pictures", type=int, default=64)
    arguments = parser.parse_args()
    bundle, source = Bundle.open(arguments.bundle), REFERENCE / arguments.pipeline
    prompts = read_prompts(source)
    wanted = [prompts[i % len(prompts)] for i in range(arguments.pictures)]
    exact = pictures(bundle, wanted)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix=".observers-", dir=bundle.path.parent) as temporary:  # links do not cross file systems
        folder = Path(temporary)
        drawn = draw_items(bundle, prompts, Drawing("uniform", arguments.samples, 20, guidance_scale=3.0))
        (folder / "items").write_bytes(pickle.dumps(drawn))
        for name in OBSERVERS:
            rows[name] = observed(bundle, source if name == "torch" else None, folder / "items", folder / name)
            drew = pictures(quantize(bundle, folder / name, folder / f"int8-{name}"), wanted)
            psnr = [psnr_db(b, a) for a, b in zip(exact, drew, strict=True)]
            rows[name] |= {
                "PSNR median dB": round(float(np.median(psnr)), 2),
                "PSNR 10th percentile dB": round(float(np.percentile(psnr, 10)), 2),
            }
        apart = difference({name: QuantizationState.load(folder / name) for name in OBSERVERS})
    head = ["observer", *rows[OBSERVERS[0]]]
    print(text.markdown_table(head, [[name, *row.values()] for name, row in rows.items()]))
    print(apart)
    settings = {"samples": arguments.samples, "pictures": arguments.pictures, "threads": len(os.sched_getaffinity(0))}
    save(f"observers_{arguments.pipeline}", {**settings, "rows": rows, "difference": apart})


if __name__ == "__main__":
    main()
