"""Further ways to quantize, beside each other: python benchmarks/quantization_methods.py fashion --units

Every row is a bundle that ONNX Runtime ran, scored as in quantization.py: 256 pictures, 20 steps, guidance 3, against the float
pipeline's from the same noise; "processor s" is what the row took of all threads, drawing its pictures (the same in all rows) included.

* ``--units``: rounding that learns, fitted to the whole network or to each of its blocks in turn, beside nearest and GPTQ, at W4A8
* ``--modelopt``: nvidia-modelopt's balances and branches, and its choice of formats, beside ours
* ``--time``: the time embedding quantized, with TIAR, and float

Rows that are in the results already are not measured again; ``--fresh`` begins anew, ``--only TEXT`` measures rows with that in their name.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from _report import REFERENCE, RESULTS, save
from quantization import FORMATS, GUIDANCE, HEAD, PICTURES, SAMPLES, STEPS, _Bench, shown

from edgediffusion import text
from edgediffusion.optimize.recipe import Recipe, load_placement, with_preset

Case = tuple[str, str, Recipe]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("fashion", "fashion-dit"))
    kinds = parser.add_mutually_exclusive_group(required=True)
    for kind in CASES:
        kinds.add_argument(f"--{kind}", dest="kind", action="store_const", const=kind)
    parser.add_argument("--only", default="")
    parser.add_argument("--fresh", action="store_true")
    arguments = parser.parse_args()
    name = f"quantization_{arguments.kind}_{arguments.model.replace('-', '_')}"
    cases, rows = CASES[arguments.kind](), {} if arguments.fresh else _known(name)
    with tempfile.TemporaryDirectory(dir=REFERENCE.parent, prefix=".quantization-") as folder:  # links do not cross file systems
        bench = _Bench(arguments.model, Path(folder))
        for form, method, recipe in cases:
            if (form, method) in rows or arguments.only not in f"{form} {method}":
                continue
            started = time.process_time()
            score = bench.score(recipe, load_placement("onnxruntime_cpu"), "uniform")
            rows[form, method] = {
                "model": arguments.model,
                "format": form,
                "method": method,
                **score,
                "processor_s": time.process_time() - started,
            }
            ordered = [rows[case[:2]] for case in cases if case[:2] in rows]
            save(name, {"pictures": PICTURES, "steps": STEPS, "guidance_scale": GUIDANCE, "samples": SAMPLES, "rows": ordered})
    print(text.markdown_table((*HEAD, "processor s"), [[*shown(row), f"{row['processor_s']:.0f}"] for row in rows.values()]))


def _known(name: str) -> dict[tuple[str, str], dict[str, Any]]:
    file = RESULTS / f"{name}.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    return {(row["format"], row["method"]): row for row in rows}


def _recipe(form: str, **changes: Any) -> Recipe:
    """Everything of quantization.py's first table but learning, with changes."""
    plain = with_preset(Recipe(form, *FORMATS[form], ranges="mse"), changes.pop("preset", "ends"))
    return replace(plain, exclude=(*changes.pop("exclude", ()), *plain.exclude), **changes)


def _units() -> Sequence[Case]:
    cases = [("W4A8", rounding, _recipe("W4A8", rounding=rounding)) for rounding in ("nearest", "gptq")]
    for rounding in ("adaround", "straight-through"):
        for unit in ("network", "block"):
            cases.append(("W4A8", f"{rounding}, {unit}", _recipe("W4A8", rounding=rounding, reconstruct=unit)))
    return cases


def _modelopt() -> Sequence[Case]:
    cases = [("W8A8", b, _recipe("W8A8", balance=b)) for b in ("none", "search", "smoothquant", "modelopt-smoothquant", "modelopt-awq")]
    cases += [("W4A8", b, _recipe("W4A8", balance=b)) for b in ("none", "search", "modelopt-awq")]
    for balance in ("search", "modelopt-svdquant"):
        cases.append(("W4A8", f"{balance}, rank 32", _recipe("W4A8", balance=balance, rank=32)))
    for form, bits in (("W8A8", 9.0), ("W8A8", 9.5), ("W8A8", 10.5), ("W4A8", 5.0), ("W4A8", 6.0), ("W4A8", 7.0)):
        cases.append((form, f"search, {bits:g} bits chosen by modelopt", _recipe(form, effective_bits=bits)))
    return sorted(cases, key=lambda case: case[0] != "W8A8")


def _time() -> Sequence[Case]:
    cases, ends = [], ("^conv_in$", "^conv_out$")
    for form in ("W8A8", "W4A8"):
        cases.append((form, "time embedding float", _recipe(form)))
        for method, temporal in (("nearest", ""), ("TIAR", "tiar")):
            cases.append(
                (form, f"time embedding quantized, {method}", _recipe(form, preset="q-diffusion", exclude=ends, temporal=temporal))
            )
    return cases


CASES = {"units": _units, "modelopt": _modelopt, "time": _time}


if __name__ == "__main__":
    main()
