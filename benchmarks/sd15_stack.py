"""What each part of the stack takes at Stable Diffusion 1.5's size, one table: python benchmarks/sd15_stack.py FOLDER [--steps 20]

FOLDER is one in which ``python benchmarks/sd15.py --parts make,export,calibrate,cut --folder FOLDER`` made a pipeline of that shape,
with random weights, a small text encoder and a small decoder: times and memory of a UNet of 860 million parameters, and no quality.
Pictures of 512 x 512 pixels with guidance, of 20 steps: torch takes nine minutes for one of 50. The few-step row is what a student
without guidance does, 4 steps of one row.

Each row is a process of its own, one after the other, since together they would not fit into memory: two steps that are not counted,
then --runs pictures.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from _report import save
from sd15 import CUT, POLICY, PROMPTS
from stack import Row, workers

from edgediffusion import text
from edgediffusion.bundle import Bundle
from edgediffusion.optimize import QuantizationState
from edgediffusion.optimize.quantize import quantize

GUIDANCE = 5.0
STUDENT_STEPS = 4


def rows_of(folder: Path, steps: int) -> dict[str, Row]:
    ours = {"kind": "bundle", "steps": steps, "guidance_scale": GUIDANCE}
    float32, int8 = ({**ours, "bundle": str(folder / name)} for name in ("float", "int8-cut"))
    diffusers = {"kind": "diffusers", "source": str(folder / "source"), "class": "StableDiffusionPipeline"}
    return {
        "diffusers": {**diffusers, "steps": steps, "guidance_scale": GUIDANCE},
        "ours, float32": float32,
        "ours, int8": int8,
        f"ours, int8, {POLICY}": {**int8, "cache": POLICY},
        f"ours, int8, {STUDENT_STEPS} steps without guidance": {**int8, "steps": STUDENT_STEPS, "guidance_scale": 1.0},
    }


def measured(row: Row, folder: Path, runs: int) -> Row:
    with workers({"row": row}, folder) as made:
        worker = made["row"]
        worker.draw(PROMPTS[:1], [0], steps=2)
        found = [worker.draw(PROMPTS[:1], [1 + run]) for run in range(runs)]
    return {"seconds": statistics.median(run["seconds"] for run in found), "peak_mb": round(found[-1]["peak_bytes"] / 1e6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=int, default=1)
    given = parser.parse_args()
    folder = given.folder.resolve()
    if not (folder / "int8-cut").exists():
        quantize(Bundle.open(folder / "cut", verify=False), QuantizationState.load(folder / "state"), folder / "int8-cut")
    found: dict[str, Row] = {}
    for name, row in rows_of(folder, given.steps).items():
        found[name] = measured(row, folder, given.runs)
        print(name, found[name], flush=True)
        save("sd15_stack", {"steps": given.steps, "guidance_scale": GUIDANCE, "cut": CUT, "rows": found})
    first = found["diffusers"]["seconds"]
    lines = [[name, f"{row['seconds']:.1f}", f"{first / row['seconds']:.1f} x", f"{row['peak_mb']} MB"] for name, row in found.items()]
    print(text.markdown_table(("row", "s / picture", "faster", "peak memory"), lines))


if __name__ == "__main__":
    main()
