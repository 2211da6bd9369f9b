"""Rounds and calls of the samplers that are parallel in time. python benchmarks/parallel.py BUNDLE

BUNDLE is the float bundle of ``fashion``. 32 pictures one by one, 50 steps, guidance 3. ``rounds`` is how many times calls wait for
each other, which is all that counts on an engine where a window of states takes as long as one; ``calls`` is how often the network
is called, which is all that counts on an engine that is busy with one. PSNR is to the picture of DDIM, from the same noise.
"""

from __future__ import annotations

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
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    pipeline, prompts = Pipeline.from_bundle(Path(sys.argv[1])), judges.load("fashion").prompts
    settings: Any = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "sampler": "ddim"}
    rows = []
    for sampler, options in CASES:
        found = []
        for seed in range(PICTURES):
            prompt = prompts[seed % len(prompts)]
            expected = pipeline(prompt, seed=seed, **settings).pixels
            latents, rounds, calls = _drawn(pipeline, prompt, seed, sampler, options)
            found.append((psnr_db(pipeline.decode(latents), expected), rounds, calls))
            print(sampler, options, seed, *found[-1], file=sys.stderr, flush=True)
        decibels, rounds_, calls_ = (np.array(part) for part in zip(*found, strict=True))
        figures = {"rounds": float(rounds_.mean()), "calls": float(calls_.mean()), "psnr": float(np.median(decibels))}
        rows.append({"sampler": sampler, "options": options, **figures, "psnr_worst": float(decibels.min())})
    head = ["sampler", "options", "rounds", "calls", "PSNR median", "worst"]
    print(markdown_table(head, [_shown(row) for row in rows]))
    save("parallel", {"pictures": PICTURES, "steps": STEPS, "guidance_scale": GUIDANCE, "rows": rows})


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
    options = ", ".join(f"{key}={value:g}" for key, value in row["options"].items())
    return [row["sampler"], options, f"{row['rounds']:.1f}", f"{row['calls']:.1f}", f"{row['psnr']:.1f}", f"{row['psnr_worst']:.1f}"]


if __name__ == "__main__":
    main()
