"""At which steps each calibration strategy takes its items, and how long drawing them takes: a table, and
results/calibration_steps.json.

    python benchmarks/calibration_steps.py BUNDLE [--samples N] [--steps T]

BUNDLE is the float bundle of the shipped ``fashion`` (edgediffusion export edgediffusion/reference/fashion -o BUNDLE).
Step 0 is the noisiest. Processor time is that of all threads.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from _report import REFERENCE, save

from edgediffusion import text
from edgediffusion.bundle import Bundle
from edgediffusion.optimize.calibrate import read_prompts
from edgediffusion.optimize.items import Drawing, draw_items
from edgediffusion.registry import names


def row(bundle: Bundle, drawing: Drawing) -> dict[str, Any]:
    started, cpu = time.perf_counter(), time.process_time()
    record = draw_items(bundle, read_prompts(REFERENCE / "fashion"), drawing).record
    return {
        "strategy": drawing.strategy,
        "options": dict(drawing.options),
        "counts": record["counts"],
        "s": round(time.perf_counter() - started, 1),
        "processor s": round(time.process_time() - cpu, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":", 1)[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    settings: list[tuple[str, dict[str, object]]] = [(name, {}) for name in names("optimize.calibration")]
    settings += [("ndtc", {"variant": "paper"}), ("stride", {"wanted": 5}), ("tdac", {"setting": "coco"})]
    rows = [row(bundle, Drawing(name, arguments.samples, arguments.steps, options=options)) for name, options in sorted(settings, key=str)]
    head = ["strategy", "options", "items at steps 0, 1, 2, ...", "s", "processor s"]
    cells = [[r["strategy"], _text(r["options"]), " ".join(map(str, r["counts"])), r["s"], r["processor s"]] for r in rows]
    print(text.markdown_table(head, cells))
    save("calibration_steps", {"samples": arguments.samples, "steps": arguments.steps, "rows": rows})


def _text(options: dict[str, object]) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items())


if __name__ == "__main__":
    main()
