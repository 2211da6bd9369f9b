"""Rounds and calls of the samplers that are parallel in time: python benchmarks/parallel.py BUNDLE [--batched ROWS] [--pictures N]

BUNDLE is the float bundle of ``fashion``. N pictures (32) one by one, 50 steps, guidance 3. ``rounds`` is how many times calls wait for
each other, which is all that counts on an engine where a window of states takes as long as one; ``calls`` is how often the network
is called, which is all that counts on an engine that is busy with one. PSNR is to the picture of DDIM, from the same noise.

With --batched, seconds a picture are measured instead. ROWS is the same pipeline exported with --row-timesteps, which is asked about a
window in one call. Three ways take turns with every picture: DDIM and the sampler one state after the other, by BUNDLE, and the sampler
with whole windows, by ROWS. Seconds are medians over the pictures, of the steps alone; the first picture of each way is not
counted. ``difference`` is the largest between the latents of one after the other and of windows.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _report import save

from edgediffusion.profiles import judges
from edgediffusion.profiles.quality import psnr_db
from edgediffusion.registry import find
from edgediffusion.runtimes import Pipeline
from edgediffusion.runtimes.denoiser import to_x0
from edgediffusion.runtimes.noise import TorchNoise
from edgediffusion.text import markdown_table

PICTURES, STEPS, GUIDANCE = 32, 50, 3.0
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("paradigms", {"window": 10, "tolerance": 0.1}),
    ("paradigms", {"window": 10, "tolerance": 0.03}),
    ("paradigms", {"window": 50, "tolerance": 0.1}),
    ("parataa", {"window": 10}),
    ("parataa", {"window": 10, "memory": 1}),
    ("parataa", {"window": 10, "absolute": 0.003, "relative": 0.015}),
    ("parataa", {"window": 50}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--batched", type=Path, metavar="ROWS", help="the bundle with a time step for each row")
    parser.add_argument("--pictures", type=int, default=PICTURES, help=f"of each row of the table; {PICTURES} by default")
    given = parser.parse_args()
    pipeline = Pipeline.from_bundle(given.bundle)
    facts = {"pictures": given.pictures, "steps": STEPS, "guidance_scale": GUIDANCE}
    if given.batched is None:
        rows = [_counted(pipeline, given.pictures, sampler, options) for sampler, options in CASES]
        print(markdown_table(["sampler", "options", "rounds", "calls", "PSNR median", "worst"], [_shown(row) for row in rows]))
        save("parallel", {**facts, "rows": rows})
        return
    batched = Pipeline.from_bundle(given.batched)
    rows = [_timed(pipeline, batched, given.pictures, sampler, options) for sampler, options in CASES]
    head = ["sampler", "options", "calls", "in windows", "DDIM, s", "one by one, s", "in windows, s", "difference"]
    print(markdown_table(head, [_shown_times(row) for row in rows]))
    save("parallel_batched", {**facts, "rows": rows})


def _counted(pipeline: Pipeline, pictures: int, sampler: str, options: dict[str, Any]) -> dict[str, Any]:
    settings: Any = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "sampler": "ddim"}
    prompts, found = judges.load("fashion").prompts, []
    for seed in range(pictures):
        prompt = prompts[seed % len(prompts)]
        expected = pipeline(prompt, seed=seed, **settings).pixels
        latents, rounds, calls = _drawn(pipeline, prompt, seed, sampler, options)
        found.append((psnr_db(pipeline.decode(latents), expected), rounds, calls))
        print(sampler, options, seed, *found[-1], file=sys.stderr, flush=True)
    decibels, rounds_, calls_ = (np.array(part) for part in zip(*found, strict=True))
    figures = {"rounds": float(rounds_.mean()), "calls": float(calls_.mean()), "psnr": float(np.median(decibels))}
    return {"sampler": sampler, "options": options, **figures, "psnr_worst": float(decibels.min())}


def _timed(pipeline: Pipeline, batched: Pipeline, pictures: int, sampler: str, options: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the steps of a picture, each way in turn."""
    named = f"{sampler}:{','.join(f'{key}={value:g}' for key, value in options.items())}"
    ways = {"ddim": (pipeline, "ddim"), "one_by_one": (pipeline, named), "windows": (batched, named)}
    prompts = judges.load("fashion").prompts
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    calls: dict[str, list[int]] = {way: [] for way in ways}
    difference = 0.0
    for seed in range(-1, pictures):  # the first one makes the buffers
        results = {
            way: by(prompts[seed % len(prompts)], seed=max(seed, 0), sampler=text, num_inference_steps=STEPS, guidance_scale=GUIDANCE)
            for way, (by, text) in ways.items()
        }
        difference = max(difference, float(np.abs(results["windows"].latents - results["one_by_one"].latents).max()))
        for way, result in results.items() if seed >= 0 else ():
            seconds[way].append(sum(result.timings.step_ms) / 1e3)
            calls[way].append(result.calls)
        print(named, seed, {way: result.calls for way, result in results.items()}, file=sys.stderr, flush=True)
    medians = {f"{way}_s": statistics.median(own) for way, own in seconds.items()}
    means = {f"{way}_calls": statistics.mean(own) for way, own in calls.items()}
    return {"sampler": sampler, "options": options, **means, **medians, "difference": difference}


def _drawn(pipeline: Pipeline, prompt: str, seed: int, sampler: str, options: dict[str, Any]) -> tuple[np.ndarray, int, int]:
    module = find("runtimes.samplers", sampler)
    settings: Any = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    points = module.points(pipeline.sampling.schedule, STEPS)
    predict = pipeline.predictor(prompt, sampler=sampler, **settings)

    def denoise(states: list[np.ndarray], indices: list[int]) -> list[np.ndarray]:
        return [to_x0(pipeline.sampling.prediction, x, predict(x, i), points.at[i]) for x, i in zip(states, indices, strict=True)]

    noise = TorchNoise(seed)
    x = points.start(noise.normal((1, pipeline.sampling.latent_channels, *_size(pipeline))))
    rounds = list(module.rounds(denoise, x, points, noise, replace(module.DEFAULT, **options)))
    return rounds[-1].states[-1], len(rounds), sum(each.calls for each in rounds)


def _size(pipeline: Pipeline) -> tuple[int, int]:
    sampling = pipeline.sampling
    return sampling.height // sampling.downsampling, sampling.width // sampling.downsampling


def _shown(row: dict[str, Any]) -> list[str]:
    figures = [f"{row[key]:.1f}" for key in ("rounds", "calls", "psnr", "psnr_worst")]
    return [row["sampler"], _listed(row["options"]), *figures]


def _shown_times(row: dict[str, Any]) -> list[str]:
    counts = [f"{row[key]:.1f}" for key in ("one_by_one_calls", "windows_calls")]
    seconds = [f"{row[key]:.3f}" for key in ("ddim_s", "one_by_one_s", "windows_s")]
    return [row["sampler"], _listed(row["options"]), *counts, *seconds, f"{row['difference']:.1g}"]


def _listed(options: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value:g}" for key, value in options.items())


if __name__ == "__main__":
    main()
