"""What the quality metrics say of int8, beside changes whose size is known. python benchmarks/quality.py FLOAT INT8

FLOAT and INT8 are bundles of ``fashion``. 512 pictures of the judge's own prompts, 20 steps, guidance 3, are what the others
are measured against: int8 from the same noise; float in half the steps, from the same noise; float from other noise, which is
what the metrics say of the very same pipeline drawing again; and float at guidance 1, which follows prompts less and keeps more
of the variety of real pictures.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
from _report import save

from edgediffusion.profiles import judges
from edgediffusion.profiles.quality import Quality, Reference
from edgediffusion.profiles.quality_table import PAIR_HEAD, SET_HEAD, pair_row, set_row
from edgediffusion.runtimes import Pipeline
from edgediffusion.text import markdown_table

PICTURES, BATCH, STEPS, GUIDANCE, OTHER_SEED = 512, 16, 20, 3.0, 1_000_000


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    judge = judges.load("fashion")
    prompts = [judge.prompts[i % len(judge.prompts)] for i in range(PICTURES)]
    full, small = (Pipeline.from_bundle(Path(folder)) for folder in sys.argv[1:])
    reference = Reference(_draw(full, prompts), prompts=prompts, judge=judge)
    variants = {
        "int8": _draw(small, prompts),
        "float32, 10 steps": _draw(full, prompts, steps=10),
        "float32, other noise": _draw(full, prompts, seed=OTHER_SEED),
        "float32, guidance 1": _draw(full, prompts, guidance=1.0),
    }
    found = {name: reference.measure(pixels) for name, pixels in variants.items()}
    print(tables(found))
    made = small.bundle.history[-1].arguments
    quantized = {name: made.get(name) for name in ("recipe", "state", "target")}
    settings = {"pictures": PICTURES, "steps": STEPS, "guidance_scale": GUIDANCE, "int8": quantized}
    save("quality", {**settings, "variants": {name: asdict(quality) for name, quality in found.items()}})


def _draw(pipeline: Pipeline, prompts: list[str], *, steps: int = STEPS, guidance: float = GUIDANCE, seed: int = 0) -> np.ndarray:
    parts = []
    for at in range(0, len(prompts), BATCH):
        part = prompts[at : at + BATCH]
        seeds = range(seed + at, seed + at + len(part))
        print(f"{steps} steps, guidance {guidance:g}, seeds from {seed}: {at} of {len(prompts)}", file=sys.stderr, flush=True)
        parts.append(pipeline(part, num_inference_steps=steps, guidance_scale=guidance, seed=seeds).pixels)
    return np.concatenate(parts)


def tables(found: dict[str, Quality]) -> str:
    pairs = [[name, *pair_row(score)] for name, quality in found.items() for score in quality.pairs]
    sets = [[name, *set_row(score)] for name, quality in found.items() for score in quality.sets]
    return f"{markdown_table(['pictures', *PAIR_HEAD], pairs)}\n\n{markdown_table(['pictures', *SET_HEAD], sets)}"


if __name__ == "__main__":
    main()
