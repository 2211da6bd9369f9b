"""Few steps: samplers of the student beside solvers of its teacher. python benchmarks/few_step.py STUDENT TEACHER

STUDENT and TEACHER are the float bundles of ``fashion-lcm`` and ``fashion``. 512 pictures for each sampler and number of steps, of the
judge's prompts, guidance 3: embedded in the student, two rows a call in the teacher. ``calls`` is how often the network is called
for a picture. Rows that are in the results already are not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from _drawing import Gallery, figures
from _report import RESULTS, save

from edgediffusion.runtimes import Pipeline
from edgediffusion.text import markdown_table

PICTURES, GUIDANCE = 512, 3.0
STUDENT: list[tuple[str, str | None, int]] = list(
    itertools.product(("lcm", "tcd:gamma=0", "tcd", "tcd:gamma=0.8", "scm"), (None,), (1, 2, 4, 8))
)
TEACHER: list[tuple[str, str | None, int]] = [
    *itertools.product(("ddim", "dpmpp-2m"), ("trailing",), (4, 8, 10)),
    ("dpmpp-2m", "karras", 8),
    ("dpmpp-2m", "ays", 8),
    ("fastdpm", None, 10),
    ("fastdpm:approximation=var", None, 10),
    ("restart:table=4/1/0.5/2", "karras", 8),
    ("ddim", "trailing", 20),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path)
    parser.add_argument("teacher", type=Path)
    arguments = parser.parse_args()
    file = RESULTS / "few_step.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if file.exists() else []
    gallery, reference = Gallery(PICTURES), None
    for name, cases in (("student", STUDENT), ("teacher", TEACHER)):
        pipeline = Pipeline.from_bundle(getattr(arguments, name))
        for sampler, spacing, steps in cases:
            key = {"network": name, "sampler": sampler, "spacing": spacing, "steps": steps}
            if any(key.items() <= row.items() for row in rows):
                continue
            options: dict[str, Any] = {"sampler": sampler, "spacing": spacing, "num_inference_steps": steps, "guidance_scale": GUIDANCE}
            pixels = gallery.draw(pipeline, str(key), **options)
            reference = reference or gallery.reference(pixels)  # only the figures of sets are kept, which need no reference
            found = figures(reference.measure(pixels))
            found.pop("psnr")
            calls = len(pipeline("a bag", **options).timings.step_ms)
            rows.append({**key, "calls": calls, **found})
            save("few_step", {"pictures": PICTURES, "guidance_scale": GUIDANCE, "rows": rows})
    head = ["network", "sampler", "spacing", "steps", "calls", "agreement", "Fréchet", "interval of it"]
    print(markdown_table(head, [_shown(row) for row in rows]))


def _shown(row: dict[str, Any]) -> list[str]:
    figures = [f"{row['agreement']:.1%}", f"{row['frechet']:.1f}", f"{row['frechet_low']:.1f} to {row['frechet_high']:.1f}"]
    return [row["network"], row["sampler"], row["spacing"] or "its own", str(row["steps"]), str(row["calls"]), *figures]


if __name__ == "__main__":
    main()
