"""One row of stack.py's table as a process of its own: it loads what the row is about and draws when it is told to.

    python benchmarks/_stack_worker.py '{"kind": "diffusers", "source": FOLDER, "steps": 50, ...}'

Each line of stdin is a JSON object with ``prompts`` and ``seeds``, one a picture, and perhaps ``file`` for the pixels and ``steps``, if
not as many as the row has; the line printed for it has the seconds and the process's peak of resident memory. ``kind`` is
``diffusers``, by torch as diffusers comes and with another package's cache where the row names one, or ``bundle``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Draw = Callable[[list[str], list[int], int], np.ndarray]


def _bundle(row: dict[str, Any]) -> Draw:
    from edgediffusion.runtimes import Pipeline

    pipeline = Pipeline.from_bundle(row["bundle"], target=row.get("target"), **({"cache": row["cache"]} if row.get("cache") else {}))
    options = {"guidance_scale": row["guidance_scale"], "sampler": row.get("sampler")}
    if row.get("cache"):
        options["cache"] = row["cache"]
    return lambda prompts, seeds, steps: pipeline(prompts, seed=seeds, num_inference_steps=steps, **options).pixels


def _diffusers(row: dict[str, Any]) -> Draw:
    import diffusers
    import torch

    without = {"text_encoder_3": None, "tokenizer_3": None} if row["class"] == "StableDiffusion3Pipeline" else {}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(row["source"], dtype=torch.float32, **without)
    pipeline.set_progress_bar_config(disable=True)
    if "scheduler" in row:
        pipeline.scheduler = getattr(diffusers, row["scheduler"]).from_config(pipeline.scheduler.config)
    peer = row.get("peer")
    if peer == "DeepCache":
        from DeepCache import DeepCacheSDHelper

        helper = DeepCacheSDHelper(pipe=pipeline)
        helper.set_params(cache_interval=row["interval"], cache_branch_id=0)
        helper.enable()
    elif peer == "cache-dit":
        import cache_dit

        config = cache_dit.DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=row["threshold"])
        cache_dit.enable_cache(pipeline, cache_config=config)

    def draw(prompts: list[str], seeds: list[int], steps: int) -> np.ndarray:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = {"num_inference_steps": steps, "guidance_scale": row["guidance_scale"]}
        pixels: np.ndarray = pipeline(prompts, generator=generators, output_type="np", **options).images
        return pixels

    return draw


def _peak_bytes() -> int:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print what is no answer
    row = json.loads(sys.argv[1])
    draw = (_diffusers if row["kind"] == "diffusers" else _bundle)(row)
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.perf_counter()
        pixels = draw(asked["prompts"], asked["seeds"], asked.get("steps", row["steps"]))
        seconds = time.perf_counter() - started
        if "file" in asked:
            np.save(asked["file"], pixels)
        print(json.dumps({"seconds": seconds, "peak_bytes": _peak_bytes()}), file=answers, flush=True)


if __name__ == "__main__":
    main()
