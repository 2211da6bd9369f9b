"""Which layers of a shipped pipeline stay float at int8, and what that is worth: python benchmarks/sensitivity.py fashion

Exports the pipeline, calibrates int8 as the demo does, and prints the Pareto table of ``edgediffusion sensitivity``: errors of the
guided prediction on items that the calibration has not seen, a step's time over the float one's, predicted and measured. Then, with
``--check N``, the errors of N layers (all with 0) are measured one at a time, a graph for each, and their Spearman correlation
with the errors that all came from a few passes is told, with the seconds of both.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from _report import REFERENCE, save

from edgediffusion import text
from edgediffusion.bundle import Bundle
from edgediffusion.cli._progress import Progress
from edgediffusion.export import export
from edgediffusion.optimize import QuantizationState, calibrate
from edgediffusion.optimize.calibrate import read_prompts
from edgediffusion.optimize.items import Drawing, draw_items
from edgediffusion.optimize.recipe import load_placement, recipe_of
from edgediffusion.optimize.sensitivity import Request, sensitivity
from edgediffusion.optimize.sensitivity_bench import Bench
from edgediffusion.optimize.sensitivity_errors import Quantization, errors_of_source
from edgediffusion.registry import find

SAMPLES, STEPS, GUIDANCE, ITEMS = 128, 20, 5.0, 20
PROBES = (1, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("fashion", "fashion-dit"))
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--check", type=int, default=None, metavar="N")
    arguments = parser.parse_args()
    source = REFERENCE / arguments.model
    with tempfile.TemporaryDirectory(dir=REFERENCE.parent, prefix=".sensitivity-") as name, Progress() as progress:
        folder = Path(name)
        bundle = export(source, folder / "float32", progress=progress)
        settings: dict[str, Any] = {"samples": SAMPLES, "steps": STEPS, "guidance_scale": GUIDANCE, "progress": progress}
        state = calibrate(bundle, source=source, output=folder / "state", **settings)
        request = Request(ITEMS, arguments.runs)
        found = sensitivity(bundle, state, folder / "report.json", source=source, request=request, progress=progress)
        checked = None if arguments.check is None else _check(bundle, state, source, folder, arguments.check, progress)
    print(found.markdown())
    print("\n".join(found.notes))
    if checked:
        seconds = checked["seconds"]
        rows = [[f"{probes} probes", f"{value:.3f}", f"{seconds[probes]:.1f}"] for probes, value in checked["spearman"].items()]
        rows.append([f"one at a time, {len(checked['layers'])} layers", "1", f"{seconds['one at a time']:.1f}"])
        print("\n" + text.markdown_table(["errors", "Spearman", "processor s"], rows))
    save(f"sensitivity_{arguments.model.replace('-', '_')}", {"runs": arguments.runs, "report": asdict(found), "check": checked})


def _check(bundle: Bundle, state: QuantizationState, source: Path, folder: Path, count: int, progress: Progress) -> dict[str, Any]:
    """Processor seconds of both ways to the errors, and how they rank the layers."""
    (component,) = bundle.with_role("denoise")
    items = [item.feeds for item in draw_items(bundle, read_prompts(source), Drawing("uniform", ITEMS, STEPS, 1, GUIDANCE)).items]
    states = {name.removeprefix(f"{component.name}/"): layer for name, layer in state.layers.items()}
    recipe, placement = recipe_of(state.recipe), load_placement("onnxruntime-cpu")
    place = folder / "check"
    place.mkdir()
    bench = Bench(bundle, component, states, recipe, placement, find("runtimes.engines", "onnxruntime"), items, GUIDANCE, place)
    bench.open(runs=1, threads=1)
    marked = bench.marked
    names = [name for name in marked.layers if name in marked.quantized]
    quantization = Quantization(states, recipe, placement, names, marked.quantized_outputs)
    quick, seconds = {}, {}
    for probes in PROBES:
        started = time.process_time()
        quick[probes] = errors_of_source(bundle, component, source, items, quantization, guidance_scale=GUIDANCE, probes=probes)
        seconds[probes] = time.process_time() - started
    started = time.process_time()
    chosen = names if count == 0 else names[:: max(1, len(names) // count)]
    exact = bench.errors(chosen, progress)
    return {
        "spearman": {probes: _spearman([errors[n] for n in chosen], [exact[n] for n in chosen]) for probes, errors in quick.items()},
        "seconds": {**seconds, "one at a time": time.process_time() - started},
        "layers": {n: {**{f"{probes} probes": errors[n] for probes, errors in quick.items()}, "one at a time": exact[n]} for n in chosen},
    }


def _spearman(a: list[float], b: list[float]) -> float:
    return float(np.corrcoef(*(np.argsort(np.argsort(values)) for values in (a, b)))[0, 1])


if __name__ == "__main__":
    main()
