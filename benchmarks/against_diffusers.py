"""Our pictures beside diffusers' own, from the same noise: python benchmarks/against_diffusers.py

For every shipped pipeline and sampler, the largest difference of any pixel in units of 1/255, over four prompts; and
the starting noise beside ``torch.Generator().manual_seed``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from _report import REFERENCE, save

from edgediffusion import text
from edgediffusion.export import export
from edgediffusion.export.schedule import scheduler_of
from edgediffusion.runtimes import Pipeline, noise

PROMPTS = ["a photo of a dark dress", "a photo of an ankle boot", "bag", "trousers"]
SEED, GUIDANCE = 11, 5.0
SOLVERS = (
    "ddim,ddpm,euler,euler-ancestral,heun,dpm2,dpm2-ancestral,lms,dpmpp-2m,dpmpp-2m:order=3,dpmpp-2m-sde,"
    "dpmpp-3m-sde:source=diffusers,deis,unipc,unipc:order=3,sa-solver"
)
CASES = (
    *(("fashion", sampler, 20) for sampler in SOLVERS.split(",")),
    ("fashion-lcm", "lcm", 4),
    ("fashion-dit", "flow-euler", 20),
    ("fashion-dit", "flow-heun", 20),
    ("fashion-dit", "dpmpp-2m", 20),
    ("fashion-dit", "unipc", 20),
)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, sampler, steps in CASES:
            bundle = Path(folder) / name
            if not bundle.exists():
                export(REFERENCE / name, bundle)
            ours = Pipeline.from_bundle(bundle)(PROMPTS, sampler=sampler, num_inference_steps=steps, guidance_scale=GUIDANCE, seed=SEED)
            difference = np.abs(ours.pixels - _diffusers(name, sampler, steps)).max() * 255
            rows.append([name, sampler, steps, f"{difference:.4f}"])
    print(text.table(["pipeline", "sampler", "steps", "largest difference in 1/255"], rows))
    found = _noise_difference()
    print(f"\nstarting noise: largest difference to torch.randn {found:.1e}")
    save("against_diffusers", {"prompts": PROMPTS, "guidance_scale": GUIDANCE, "seed": SEED, "rows": rows, "noise_difference": found})


def _diffusers(name: str, sampler: str, steps: int) -> np.ndarray:
    without = {"text_encoder_3": None, "tokenizer_3": None} if name == "fashion-dit" else {}  # diffusers wants to be told
    pipeline = diffusers.DiffusionPipeline.from_pretrained(REFERENCE / name, **without)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = scheduler_of(sampler, pipeline.scheduler.config)
    generator = torch.Generator().manual_seed(SEED)
    drawn = pipeline(PROMPTS, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=generator, output_type="np")
    images: np.ndarray = drawn.images
    return images


def _noise_difference() -> float:
    worst = 0.0
    for seed in (0, 1, 1234, 2**40 + 7):
        source = noise.source(seed, 2, flavour="torch", dtype="float32")
        generator = torch.Generator().manual_seed(seed)
        for shape in ((2, 4, 8, 8), (2, 3), (2, 4, 9, 7)):
            worst = max(worst, float(np.abs(source.normal(shape) - torch.randn(shape, generator=generator).numpy()).max()))
    return worst


if __name__ == "__main__":
    main()
