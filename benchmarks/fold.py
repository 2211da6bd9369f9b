"""What folding the time embedding is worth: python benchmarks/fold.py NAME=BUNDLE … [--runs 200]

Each bundle is folded for the sampler and steps that it recommends. Nodes and bytes are of the denoiser's graph and weights.
A step is one call of the denoiser at the batch of one picture (two rows with guidance), of the bundle and the folded one in
turn, and the largest difference is of any pixel over the prompts below, from the same noise.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from _report import save

from edgediffusion import text
from edgediffusion.bundle import Bundle
from edgediffusion.optimize import fold
from edgediffusion.profiles import latency
from edgediffusion.runtimes import Pipeline

PROMPTS = ["a photo of a dark dress", "a photo of an ankle boot", "bag", "trousers"]
SEED = 11
HEAD = ("bundle", "steps", "nodes", "folded", "size", "folded", "step ms", "folded", "ratio", "largest difference in 1/255")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", metavar="NAME=BUNDLE")
    parser.add_argument("--runs", type=int, default=200)
    asked = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for at, given in enumerate(asked.bundles):
            name, _, path = given.rpartition("=")
            found[name or Path(path).name] = _measured(Bundle.open(path), Path(folder) / str(at), asked.runs)
    print(text.markdown_table(HEAD, [[name, *_row(result)] for name, result in found.items()]))
    save("fold", {"prompts": PROMPTS, "seed": SEED, "runs": asked.runs, "bundles": found})


def _measured(bundle: Bundle, output: Path, runs: int) -> dict[str, Any]:
    made = fold(bundle, output)
    verb = made.history[-1].arguments
    (component,) = bundle.with_role("denoise")
    alone = [replace(b, components=(component,)) for b in (bundle, made)]
    before, after = (asdict(times[component.name]) for times in latency.measure(alone, runs=runs, warmup=10))
    pixels = [Pipeline.from_bundle(b)(PROMPTS, seed=SEED).pixels for b in (bundle, made)]
    quantized = next((verb.arguments["recipe"] for verb in bundle.history if verb.name == "quantize"), None)
    settings = {"family": bundle.family, "recipe": quantized, "sampler": verb["sampler"], "steps": verb["steps"]}
    difference = float(np.abs(pixels[0] - pixels[1]).max()) * 255
    return {**settings, **verb["graphs"][component.name], "step_before": before, "step_after": after, "largest_255": difference}


def _row(found: dict[str, Any]) -> list[object]:
    before, after = found["step_before"]["median_ms"], found["step_after"]["median_ms"]
    sizes = [text.size(found[key]) for key in ("bytes_before", "bytes_after")]
    times = [f"{before:.2f}", f"{after:.2f}", f"{after / before:.3f}"]
    return [
        f"{found['steps']} {found['sampler']}",
        found["nodes_before"],
        found["nodes_after"],
        *sizes,
        *times,
        f"{found['largest_255']:.2g}",
    ]


if __name__ == "__main__":
    main()
