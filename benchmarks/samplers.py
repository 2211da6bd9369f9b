"""Every solver at every budget: how near it comes to the limit of its path, and to real pictures.

python benchmarks/samplers.py BUNDLE [--pictures 512] [--steps 4,8,10,20,50] [--samplers a,b,…] [--spacing NAME] [--limit-steps 1000]

BUNDLE is a float bundle of ``fashion`` or ``fashion-dit``. The limit is the first-order solver in 1000 steps from the same noise:
PSNR to it says how far a deterministic solver is from the path that all of them follow. Stochastic ones follow none, and have
the Fréchet distance to real pictures alone. Calls of the network are what a picture costs; some solvers take two a step.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from _report import save

from edgediffusion.errors import ArgumentError
from edgediffusion.profiles import judges
from edgediffusion.profiles.bootstrap import Bootstrap
from edgediffusion.profiles.quality import Quality, Reference
from edgediffusion.runtimes import Pipeline
from edgediffusion.runtimes.request import Request, plan
from edgediffusion.runtimes.samplers import resolve
from edgediffusion.text import markdown_table

SAMPLERS = (
    "ddim,ddim:eta=1,ddpm,pndm,pndm:skip_prk_steps=false,euler,euler-ancestral,heun,dpm2,dpm2-ancestral,lms,"
    "dpmpp-2m,dpmpp-2m:kind=heun,dpmpp-2m:order=3,dpmpp-2s,dpmpp-2m-sde,dpmpp-3m-sde,dpmpp-3m-sde:source=diffusers,"
    "deis,deis:order=3,unipc,unipc:order=3,unipc:kind=bh1,sa-solver,sa-solver:tau=0,flow-euler,flow-heun"
)
BATCH, GUIDANCE, RESAMPLES = 16, 3.0, 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--steps", default="4,8,10,20,50")
    parser.add_argument("--samplers", default=SAMPLERS)
    parser.add_argument("--spacing", default=None)
    parser.add_argument("--limit-steps", type=int, default=1000)
    options = parser.parse_args()
    pipeline, judge = Pipeline.from_bundle(options.bundle), judges.load("fashion")
    prompts = [judge.prompts[i % len(judge.prompts)] for i in range(options.pictures)]
    flow = pipeline.sampling.schedule.kind == "flow"
    limit = "flow-euler" if flow else "ddim"
    reference = Reference(
        _draw(pipeline, prompts, limit, options.limit_steps, None), prompts=prompts, judge=judge, bootstrap=Bootstrap(resamples=RESAMPLES)
    )
    found: list[dict[str, Any]] = []
    for sampler in _names(options.samplers):
        if resolve(sampler)[1].KIND not in ("both", "flow" if flow else "diffusion"):
            continue
        for steps in map(int, options.steps.split(",")):
            try:
                calls = len(
                    plan(Request("", num_inference_steps=steps, sampler=sampler, spacing=options.spacing), pipeline.sampling).points
                )
            except ArgumentError as error:  # the warm-up of PNDM takes four steps and more
                print(f"{sampler}, {steps} steps: {error}", file=sys.stderr)
                continue
            quality = reference.measure(_draw(pipeline, prompts, sampler, steps, options.spacing))
            found.append({"sampler": sampler, "steps": steps, "calls": calls, "quality": quality})
    print(table(found))
    settings = {"pictures": options.pictures, "guidance_scale": GUIDANCE, "limit": f"{options.limit_steps} steps of {limit}"}
    rows = [{**row, "quality": asdict(row["quality"])} for row in found]
    save(
        f"samplers-{'dit' if flow else 'unet'}",
        {**settings, "spacing": options.spacing or pipeline.sampling.schedule.spacing, "rows": rows},
    )


def _names(text: str) -> list[str]:
    """Names with options, which have commas of their own: a part that has an equals sign and no colon goes on with the last."""
    found: list[str] = []
    for part in text.split(","):
        if "=" in part and ":" not in part and found:
            found[-1] += f",{part}"
        else:
            found.append(part)
    return found


def _draw(pipeline: Pipeline, prompts: list[str], sampler: str, steps: int, spacing: str | None) -> np.ndarray:
    print(f"{sampler}, {steps} steps", file=sys.stderr, flush=True)
    parts = []
    for at in range(0, len(prompts), BATCH):
        part = prompts[at : at + BATCH]
        seeds = range(at, at + len(part))
        drawn = pipeline(part, num_inference_steps=steps, guidance_scale=GUIDANCE, seed=seeds, sampler=sampler, spacing=spacing)
        parts.append(drawn.pixels)
    return np.concatenate(parts)


def table(found: list[dict[str, Any]]) -> str:
    rows = [[row["sampler"], str(row["steps"]), str(row["calls"]), *_scores(row["sampler"], row["quality"])] for row in found]
    return markdown_table(["sampler", "steps", "calls", "PSNR to the limit", "Fréchet distance"], rows)


def _scores(sampler: str, quality: Quality) -> tuple[str, str]:
    deterministic = (resolve(sampler)[1].ORDER > 0 and "eta=" not in sampler) or "tau=0" in sampler
    psnr = f"{quality.pair('psnr').median:.1f} dB" if deterministic else ""
    return psnr, f"{quality.set('frechet').value:.2f}"


if __name__ == "__main__":
    main()
