"""Pictures of the judge's prompts for benchmarks of the sampling loop, and what the judge says of them."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from edgediffusion.profiles import judges
from edgediffusion.profiles.quality import Quality, Reference
from edgediffusion.runtimes import Pipeline

BATCH = 16


class Gallery:
    """``pictures`` prompts of the judge ``fashion`` in turn; picture i has the noise of seed i in every set."""

    def __init__(self, pictures: int):
        self.judge = judges.load("fashion")
        self.prompts = [self.judge.prompts[i % len(self.judge.prompts)] for i in range(pictures)]

    def draw(self, pipeline: Pipeline, label: str, **options: Any) -> np.ndarray:
        parts = []
        for at in range(0, len(self.prompts), BATCH):
            print(f"{label}: {at} of {len(self.prompts)}", file=sys.stderr, flush=True)
            part = self.prompts[at : at + BATCH]
            parts.append(pipeline(part, seed=range(at, at + len(part)), **options).pixels)
        return np.concatenate(parts)

    def reference(self, pixels: np.ndarray) -> Reference:
        return Reference(pixels, prompts=self.prompts, judge=self.judge)


def figures(quality: Quality) -> dict[str, float]:
    """Agreement with the prompt and the Fréchet distance to real pictures, with their intervals."""
    agreement, frechet = quality.set("agreement"), quality.set("frechet")
    return {
        "agreement": agreement.value,
        "frechet": frechet.value,
        "frechet_low": frechet.low,
        "frechet_high": frechet.high,
        "psnr": quality.pair("psnr").median,
    }
