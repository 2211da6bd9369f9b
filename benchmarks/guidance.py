"""What rescaled guidance and guidance in an interval do to pictures and to the work. python benchmarks/guidance.py BUNDLE [--times]

BUNDLE is the float bundle of ``fashion``. 256 pictures for each scale, rescaling and interval, of the judge's prompts, 20 steps.
An interval is two noise levels, sigma / alpha; the 20 steps lie at levels from 167 to 0.23. ``rows`` is how many rows the network
ran for a picture, of 40 with guidance at every step. Rows that are in the results already are not measured again.

With ``--times`` the time of a picture is measured for each interval instead, at batch 1, turn by turn: run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

from _drawing import Gallery, figures
from _report import RESULTS, save

from edgediffusion.runtimes import Pipeline
from edgediffusion.text import markdown_table

PICTURES, STEPS, TURNS = 256, 20, 50
SCALES, RESCALES = (3.0, 5.0), (0.0, 0.7)
INTERVALS: tuple[tuple[float, float] | None, ...] = (None, (0.5, 10.0), (1.0, 5.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--times", action="store_true")
    arguments = parser.parse_args()
    pipeline = Pipeline.from_bundle(arguments.bundle)
    if arguments.times:
        times = _times(pipeline)
        print(markdown_table(["interval", "median ms", "of all"], [[t["interval"], f"{t['ms']:.1f}", f"{t['ratio']:.2f}"] for t in times]))
        save("guidance_times", {"steps": STEPS, "turns": TURNS, "guidance_scale": 5.0, "rows": times})
        return
    rows = _measured(pipeline)
    head = ["scale", "rescale", "interval", "rows", "agreement", "Fréchet", "interval of it"]
    print(markdown_table(head, [_shown(row) for row in rows]))


def _measured(pipeline: Pipeline) -> list[dict[str, Any]]:
    file = RESULTS / "guidance.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if file.exists() else []
    gallery = Gallery(PICTURES)
    plain = None
    cases = [(1.0, 0.0, None), *itertools.product(SCALES, RESCALES, INTERVALS)]
    for scale, rescale, interval in cases:
        key = {"scale": scale, "rescale": rescale, "interval": _told(interval)}
        if any(key.items() <= row.items() for row in rows):
            continue
        if plain is None:
            plain = gallery.reference(gallery.draw(pipeline, "guidance 3", num_inference_steps=STEPS, guidance_scale=3.0))
        options: dict[str, Any] = {"guidance_scale": scale, "guidance_rescale": rescale, "guidance_interval": interval}
        pixels = gallery.draw(pipeline, str(key), num_inference_steps=STEPS, **options)
        rows.append({**key, "rows": _rows(pipeline, options), **figures(plain.measure(pixels))})
        save("guidance", {"pictures": PICTURES, "steps": STEPS, "rows": rows})
    return rows


def _rows(pipeline: Pipeline, options: dict[str, Any]) -> int:
    seen: list[int] = []
    pipeline("a bag", num_inference_steps=STEPS, observe=lambda step, feeds: seen.append(len(feeds["sample"])), **options)
    return sum(seen)


def _times(pipeline: Pipeline) -> list[dict[str, Any]]:
    """Turn by turn: what disturbs one disturbs all."""
    found: dict[str, list[float]] = {_told(interval): [] for interval in INTERVALS}
    for turn in range(TURNS + 3):
        for interval in INTERVALS:
            result = pipeline("a bag", num_inference_steps=STEPS, guidance_scale=5.0, guidance_interval=interval)
            if turn >= 3:  # the first ones warm up
                found[_told(interval)].append(sum(result.timings.step_ms))
    medians = {name: statistics.median(times) for name, times in found.items()}
    return [{"interval": name, "ms": ms, "ratio": ms / medians["all"]} for name, ms in medians.items()]


def _told(interval: tuple[float, float] | None) -> str:
    return "all" if interval is None else f"{interval[0]:g} to {interval[1]:g}"


def _shown(row: dict[str, Any]) -> list[str]:
    figures = [f"{row['agreement']:.1%}", f"{row['frechet']:.1f}", f"{row['frechet_low']:.1f} to {row['frechet_high']:.1f}"]
    return [f"{row['scale']:g}", f"{row['rescale']:g}", row["interval"], str(row["rows"]), *figures]


if __name__ == "__main__":
    main()
