"""What lowering a bundle changes, and how far two right ways to compute a graph are apart; a table, and results/lowering.json.

    python benchmarks/lowering.py fashion=FLOAT fashion-int8=INT8 ... [--half fashion=FLOAT16 ...]

Bundles as ``edgediffusion export`` and ``quantize`` write them. For every component and opset the largest difference to the graph as it
was, over the largest number (both in ONNX Runtime), and nodes. Then what the tolerances of a kit rest on, as |y - r| / |r|: a float16
bundle beside the float32 one of the same name (``--half``), inputs with ten bits beside those with all, and of a quantized graph the
kernels for integers beside Q and DQ as they stand. Inputs are a kit's golden ones.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from _report import save

from edgediffusion import text
from edgediffusion.bundle import Bundle, Component
from edgediffusion.export.kit_golden import golden_inputs, precision_of, run_graph
from edgediffusion.export.lower import lower
from edgediffusion.runtimes.sizes import usual_sizes

OPSETS = (22, 20, 19, 18, 17)
Arrays = Mapping[str, np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", metavar="NAME=BUNDLE", type=named)
    parser.add_argument("--half", nargs="*", default=[], metavar="NAME=BUNDLE", type=named, help="float16 bundles of the same names")
    given = parser.parse_args()
    lowered, apart = [], []
    with tempfile.TemporaryDirectory(prefix="lowering-") as folder:
        for name, bundle in given.bundles:
            inputs = dict(golden_inputs(bundle, usual_sizes(bundle), Path(folder)))
            lowered += [row for opset in OPSETS for row in lowered_rows(name, bundle, opset, inputs, Path(folder) / f"{name}-{opset}")]
            apart += [row for c in bundle.components for row in apart_rows(name, bundle, c, inputs[c.name][0], Path(folder))]
            for half in (half for other, half in given.half if other == name):
                apart += half_rows(name, bundle, half, inputs, Path(folder))
    save("lowering", {"lowered": lowered, "apart": apart})
    for rows in (lowered, apart):
        print("\n" + text.table(list(rows[0]), [list(row.values()) for row in rows]))


def named(given: str) -> tuple[str, Bundle]:
    name, _, folder = given.partition("=")
    return name, Bundle.open(folder, verify=False)


def lowered_rows(name: str, bundle: Bundle, opset: int, inputs: Mapping[str, tuple[Arrays, Arrays]], output: Path) -> list[dict[str, Any]]:
    made = lower(bundle, output, opset=opset)
    rows = []
    for component in bundle.components:
        report = made.history[-1].arguments["graphs"][component.name]
        if not report["rewritten"]:
            continue
        before, after = (run_graph(b, component, inputs[component.name][0], output, quantized=False) for b in (bundle, made))
        difference = max(float(np.abs(after[n].astype(np.float64) - r).max() / np.abs(r).max()) for n, r in before.items())
        nodes = f"{report['nodes_before']} -> {report['nodes']}"
        what = ", ".join(f"{count} {operator}" for operator, count in report["rewritten"].items())
        row = {"bundle": name, "graph": component.name, "opset": opset, "difference": f"{difference:.1e}", "nodes": nodes}
        rows.append({**row, "rewritten": what})
    return rows


def apart_rows(name: str, bundle: Bundle, component: Component, feeds: Arrays, place: Path) -> list[dict[str, Any]]:
    precision = precision_of(bundle, component)
    quantized = precision.startswith(("int", "fp"))
    plain = run_graph(bundle, component, feeds, place, quantized=quantized)
    short = {n: (a.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) if a.dtype == np.float32 else a for n, a in feeds.items()}
    found = {"inputs of ten bits": relative(run_graph(bundle, component, short, place, quantized=quantized), plain)}
    if quantized:
        found["kernels for integers"] = relative(run_graph(bundle, component, feeds, place, quantized=False), plain)
    row = {"bundle": name, "graph": component.name, "precision": precision}
    return [{**row, "beside": what, "apart": f"{value:.1e}"} for what, value in found.items()]


def half_rows(name: str, bundle: Bundle, half: Bundle, inputs: Mapping[str, tuple[Arrays, Arrays]], place: Path) -> list[dict[str, Any]]:
    rows = []
    for component in half.components:
        feeds, expected = inputs[component.name]
        narrow = {spec.name: feeds[spec.name].astype(spec.dtype) for spec in component.inputs}
        value = relative(run_graph(half, component, narrow, place, quantized=False), expected)
        row = {"bundle": name, "graph": component.name, "precision": "float16"}
        rows.append({**row, "beside": "float32", "apart": f"{value:.1e}"})
    return rows


def relative(found: Arrays, expected: Arrays) -> float:
    square = sum(float(np.sum((found[n].astype(np.float64) - e) ** 2)) for n, e in expected.items())
    return float((square / sum(float(np.sum(e.astype(np.float64) ** 2)) for e in expected.values())) ** 0.5)


if __name__ == "__main__":
    main()
