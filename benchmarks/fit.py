"""What `edgediffusion fit` is off by: python benchmarks/fit.py [NAME=BUNDLE ...] [--runs RUNS] [--sd15 FOLDER] [--fit]

Two tables, kept in results/fit.json:

    published   times of others (fit_published.toml, with their pages) beside estimates from the networks' graphs (fit_networks.json, made
                by _fit_graphs.py). The shares of targets/_rates.toml were fitted on every first, third, ... pair of network and target, in
                the order of their names; the others are held out.
    here        the bundles named, and with --sd15 the networks that benchmarks/sd15.py left in FOLDER: the time of a step, the median
                of --runs, and the peak memory of a process that draws one picture (of one call, for --sd15), on this processor

With --fit the shares are fitted anew, and printed for targets/_rates.toml. Nothing here is fitted to rows that are held out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from functools import cache
from itertools import product
from math import log
from pathlib import Path
from typing import Any

import tomllib
from _report import save

from edgediffusion import targets, text
from edgediffusion.targets import fit as facts

HERE = Path(__file__).parent
HEAD = ("target", "what", "format", "engine", "published s", "estimate s", "off", "")
CODES = ("int8", "fp8")
SD15 = {"float": "float/unet/model.onnx", "int8": "int8-onnxruntime-cpu/model.onnx"}
SIZES = {"batch": 2, "height": 64, "width": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", metavar="NAME=BUNDLE")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--sd15", type=Path)
    parser.add_argument("--fit", action="store_true")
    given = parser.parse_args()
    if given.fit:
        print(json.dumps(fitted(), indent=1))
        return
    rows = published()
    print(text.table(HEAD, [_line(row) for row in rows]))
    off = {
        kind: statistics.median(abs(r["off"]) for r in rows if r["held_out"] == held)
        for kind, held in (("fitted", False), ("held out", True))
    }
    counts = {kind: sum(r["held_out"] == held for r in rows) for kind, held in (("fitted", False), ("held out", True))}
    print("\n".join(f"{kind}: {counts[kind]} rows, median error {value:.0%}" for kind, value in off.items()))
    memory = published_memory()
    print(
        "\n".join(
            f"memory, {row['target']}, {row['about']}: estimate {row['estimate_bytes'] / 1e9:.2f} GB, {row['off']:+.1%}" for row in memory
        )
    )
    here = [_bundle(*named.split("=", 1), given.runs) for named in given.bundles]
    here += [_network(name, given.sd15 / file) for name, file in SD15.items()] if given.sd15 else []
    if here:
        print()
        print(text.table(list(here[0]), [[_short(value) for value in row.values()] for row in here]))
    save(
        "fit",
        {"published": rows, "published_memory": memory, "median_error": off, "here": here, "load_average": round(os.getloadavg()[0], 1)},
    )


def published() -> list[dict[str, Any]]:
    """The rows with their estimates, in the order of network and target; every second pair of these is held out."""
    networks = json.loads((HERE / "fit_networks.json").read_text(encoding="utf-8"))
    rows = tomllib.loads((HERE / "fit_published.toml").read_text(encoding="utf-8"))["rows"]
    rows.sort(key=lambda row: (next(iter(row["calls"])), row["target"], row["seconds"]))
    pairs = list(dict.fromkeys((next(iter(row["calls"])), row["target"]) for row in rows))
    for row in rows:
        row["held_out"] = pairs.index((next(iter(row["calls"])), row["target"])) % 2 == 1
        row["sums"] = [(count, *_sums(networks[name], row["format"])) for name, count in row["calls"].items()]
        row["estimate_s"] = estimated(row, facts.known_rates()["tensorrt"])
        row["off"] = row["estimate_s"] / row["seconds"] - 1
    return [{key: value for key, value in row.items() if key != "sums"} for row in rows]


def published_memory() -> list[dict[str, Any]]:
    """Rows of memory, which nothing was fitted on, with their estimates."""
    networks = json.loads((HERE / "fit_networks.json").read_text(encoding="utf-8"))
    rows = tomllib.loads((HERE / "fit_published.toml").read_text(encoding="utf-8"))["memory"]
    for row in rows:
        idle = facts.idle_bytes(_target(row["target"]))
        row["estimate_bytes"] = networks[row["network"]][row["format"]]["resident_bytes"] + idle
        row["off"] = row["estimate_bytes"] / row["bytes"] - 1
    return list(rows)


def _sums(network: dict[str, Any], format: str) -> tuple[str, dict[str, float]]:
    """The sums of a network in the row's format; decoders are in float32 where that is counted, all else in 16 bits at the most."""
    if "float32" in network:
        return "float32", network["float32"]
    return (format, network["int8"]) if format in CODES else (format, network["float16"])


def estimated(row: dict[str, Any], table: dict[str, Any]) -> float:
    """Seconds of a row with the shares of a table: what ``targets.fit.estimate`` does, over sums."""
    rates = facts.gpu_rates(_target(row["target"]), table)
    total = 0.0
    for count, format, sums in row["sums"]:
        plain = "float16" if format in CODES else format
        compute = sums["operations"] / rates.of(plain) + sums["operations_in_codes"] / rates.of(format)
        total += count * (compute + sums["bytes"] / rates.bandwidth + sums["kernels"] * rates.node_s)
    return total


def fitted() -> dict[str, Any]:
    """The shares with the smallest squares of the logarithms of estimate over time, on rows that are not held out: a grid."""
    networks = json.loads((HERE / "fit_networks.json").read_text(encoding="utf-8"))
    rows = [{**row, "sums": [(n, *_sums(networks[name], row["format"])) for name, n in row["calls"].items()]} for row in published()]
    rows = [row for row in rows if not row["held_out"]]
    capabilities = sorted({_target(row["target"]).compute_capability for row in rows})
    best: tuple[float, dict[str, Any]] = (float("inf"), {})
    for bandwidth, node_us, eight_bit in product(
        (0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0), (0.0, 1.0, 2.0, 3.0, 5.0), (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    ):
        table: dict[str, Any] = {"bandwidth": bandwidth, "node_us": node_us, "eight_bit": eight_bit, "peak": {}}
        squares = 0.0
        for capability in capabilities:
            own = [row for row in rows if _target(row["target"]).compute_capability == capability]
            errors = {share / 100: _squares(own, {**table, "peak": {capability: share / 100}}) for share in range(10, 101)}
            table["peak"][capability] = min(errors, key=lambda share: errors[share])
            squares += min(errors.values())
        if squares < best[0]:
            best = (squares, table)
    return best[1]


@cache
def _target(name: str) -> targets.Target:
    return targets.load(name)


def _squares(rows: list[dict[str, Any]], table: dict[str, Any]) -> float:
    return sum(log(estimated(row, table) / row["seconds"]) ** 2 for row in rows)


def _line(row: dict[str, Any]) -> tuple[object, ...]:
    held = "held out" if row["held_out"] else ""
    named = (row["target"], row["about"], row["format"], row["engine"])
    return (*named, f"{row['seconds']:.3g}", f"{row['estimate_s']:.3g}", f"{row['off']:+.0%}", held)


def _bundle(name: str, folder: str, runs: int) -> dict[str, Any]:
    """A whole pipeline: median step and peak memory of a process that draws one picture, beside what fit says."""
    from edgediffusion.bundle import Bundle
    from edgediffusion.profiles import latency, memory
    from edgediffusion.profiles.fit import fit

    bundle = Bundle.open(folder, verify=False)
    target, processor = _here()
    found = fit(bundle, target, processor=processor)
    (times,) = latency.measure([bundle], runs=runs)
    step = max(times[c.name].median_ms for c in bundle.with_role("denoise")) / 1e3
    steps = found.steps
    pictures = step * steps + sum(times[p.name].median_ms / 1e3 * p.calls for p in found.components if p.role != "denoise")
    peak = memory.measure(bundle).peak_bytes
    return _row(name, step, found.step_s, peak, found.needed_bytes) | {"picture s": pictures, "estimated picture s": found.picture_s}


def _network(name: str, file: Path) -> dict[str, Any]:
    """One network of Stable Diffusion 1.5's size, in a process of its own: the median of three calls, after one."""
    from edgediffusion.profiles.fit_work import pieces
    from edgediffusion.runtimes.memory import Way, need_of
    from edgediffusion.runtimes.work import graph_work

    target, processor = _here()
    work = graph_work(file, SIZES)
    estimate = facts.estimate(pieces(work, "onnxruntime"), facts.rates(target, processor)).seconds
    needed = facts.idle_bytes(target) + need_of(file, tuple(sorted(SIZES.items()))).running(Way())
    done = subprocess.run([sys.executable, "-c", _WORKER, str(file), json.dumps(SIZES)], capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    row = _row(f"sd15 {name}, one step", statistics.median(measured["seconds"]), estimate, measured["peak"], needed)
    return row | {"picture s": None, "estimated picture s": None}


def _row(name: str, step: float, estimate: float, peak: float, needed: float) -> dict[str, Any]:
    time_row = {"what": name, "step s": step, "estimated s": estimate, "time off": estimate / step - 1}
    return time_row | {"peak bytes": peak, "estimated bytes": needed, "memory off": needed / peak - 1}


def _here() -> tuple[Any, Any]:
    from edgediffusion.profiles.fit_machine import processor_of

    target = targets.load("cpu-x86-64")
    return target, processor_of(target)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


_WORKER = """
import json, sys, time
from pathlib import Path
import numpy as np
import tokenizers, PIL.Image
from edgediffusion.runtimes import Pipeline
from edgediffusion.runtimes.engines import onnxruntime
binding = onnxruntime.open_session(Path(sys.argv[1])).bind(json.loads(sys.argv[2]))
rng = np.random.default_rng(0)
for name, array in binding.inputs.items():
    array[...] = 500 if name == "timestep" else rng.standard_normal(array.shape, np.float32)
times = []
for run in range(4):
    started = time.perf_counter()
    binding.run()
    times.append(time.perf_counter() - started)
peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps({"seconds": times[1:], "peak": peak}))
"""


if __name__ == "__main__":
    main()
