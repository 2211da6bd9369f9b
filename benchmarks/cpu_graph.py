"""How ONNX Runtime on a CPU wants the reference UNet's graph: python benchmarks/cpu_graph.py

Times one step of the denoiser (guidance batch of two) for every combination of

* where Q/DQ nodes stand: nowhere (float), on inputs only, on the outputs of convolutions too (with one scale for a tensor, or
  balanced channels and a scale for each on the outer sides), on all outputs,
* group normalization as ONNX has it, or as an instance normalization over groups,
* ONNX Runtime's MatMulAddFusion on or off.

All variants are timed in turn in one process, so that what disturbs one disturbs all; ratios are to the first row.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _report import REFERENCE, save

from edgediffusion import text
from edgediffusion.bundle import Bundle
from edgediffusion.export import export
from edgediffusion.optimize import QuantizationState, calibrate
from edgediffusion.optimize.recipe import Placement, load_recipe

LAYERS = ("Conv", "MatMul", "Gemm")
PLACEMENTS = {
    "float": None,
    "inputs": Placement("inputs", "uint8", LAYERS),
    "inputs, Conv outputs": Placement("conv", "uint8", LAYERS, ("Conv",)),
    "inputs, Conv outputs, by channel": Placement("channels", "uint8", LAYERS, ("Conv",), channel_scales=True),
    "inputs, all outputs": Placement("all", "uint8", LAYERS, LAYERS),
}
PROMPTS = ["a photo of a dress", "a dark coat", "a sneaker", "a bright bag"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=60)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        sessions = _sessions(Path(folder))
        times: dict[tuple[str, str, str], list[float]] = {key: [] for key in sessions}
        for at in range(runs + 5):
            for key, run in sessions.items():
                started = time.perf_counter()
                run()
                if at >= 5:
                    times[key].append((time.perf_counter() - started) * 1e3)
    base = float(np.median(times["float", "group", "on"]))
    rows = [[*key, f"{np.median(t):.2f}", f"{np.min(t):.2f}", f"{np.median(t) / base:.2f}"] for key, t in times.items()]
    head = ["Q/DQ", "normalization", "MatMulAddFusion", "median ms", "min ms", "ratio"]
    print(text.table(head, rows))
    save("cpu_graph", {"runs": runs, "rows": [dict(zip(head, row, strict=True)) for row in rows]})


def _sessions(folder: Path) -> dict[tuple[str, str, str], Callable[[], Any]]:
    from edgediffusion.export import pipeline

    lower = pipeline.lower_group_norm
    instance = export(REFERENCE / "fashion", folder / "instance")
    states = {balance: _state(instance, balance, folder) for balance in ("none", "search")}
    pipeline.lower_group_norm = lambda model: 0
    group = export(REFERENCE / "fashion", folder / "group")
    pipeline.lower_group_norm = lower
    found = {}
    for (name, placement), (form, bundle) in itertools.product(PLACEMENTS.items(), (("group", group), ("instance", instance))):
        balanced = placement is not None and placement.channel_scales
        model = _model(bundle, states["search" if balanced else "none"], placement, folder / f"{name}-{form}")
        for fusion in ("on", "off"):
            found[name, form, fusion] = _runner(model, fusion == "on")
    return found


def _state(bundle: Bundle, balance: str, folder: Path) -> QuantizationState:
    recipe = replace(load_recipe("int8"), balance=balance)
    settings: dict[str, Any] = {"samples": 16, "steps": 10, "prompts": PROMPTS, "recipe": recipe}
    return calibrate(bundle, source=REFERENCE / "fashion", output=folder / f"state-{balance}", **settings)


def _model(bundle: Bundle, state: QuantizationState, placement: Placement | None, folder: Path) -> Path:
    import onnx_ir as ir

    from edgediffusion.optimize.graph_file import load_graph, store_weights
    from edgediffusion.optimize.passes.insert_qdq import insert_qdq

    model = load_graph(bundle.path / bundle.component("unet").model)
    if placement is not None:
        insert_qdq(model, {n.removeprefix("unet/"): layer for n, layer in state.layers.items()}, load_recipe("int8"), placement)
    folder.mkdir()
    store_weights(model, folder)
    ir.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def _runner(model: Path, fusion: bool) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    without = [] if fusion else ["MatMulAddFusion"]
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"], disabled_optimizers=without)
    rng = np.random.default_rng(0)
    sizes = {"batch": 2, "height": 8, "width": 8}
    feeds = {
        i.name: rng.standard_normal([sizes.get(s, s) for s in i.shape]).astype(np.float32)
        if i.name != "timestep"
        else np.full(1, 500, "f4")
        for i in session.get_inputs()
    }
    return lambda: session.run(None, feeds)


if __name__ == "__main__":
    main()
