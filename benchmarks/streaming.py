"""Frames a second of a stream, beside the same steps frame by frame: python benchmarks/streaming.py [--frames N]

The few-step student, exported with --row-timesteps, drawing over a picture that turns. Beside each stream of so many steps stands image
to image with as many calls of the network a frame, frame by frame in turn with it. Then a long stream: does memory grow? And one of
which half of the frames stand still, with the similarity filter.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from _report import REFERENCE, save
from PIL import Image

from edgediffusion import text
from edgediffusion.export import export
from edgediffusion.runtimes import Pipeline
from edgediffusion.runtimes.streaming import Stream
from edgediffusion.runtimes.streaming.filter import SimilarityFilter
from edgediffusion.runtimes.streaming.stream import stream_timesteps

MODEL, PROMPT, STRENGTH = "fashion-lcm", "a coat", 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=200, help="of each stream; the long one has ten times as many")
    count = parser.parse_args().frames
    with tempfile.TemporaryDirectory(dir=REFERENCE.parent, prefix=".streaming-") as folder:  # links do not cross file systems
        bundle = export(REFERENCE / MODEL, Path(folder) / MODEL, row_timesteps=True)
        pipeline = Pipeline.from_bundle(bundle)
        start = pipeline(PROMPT, num_inference_steps=4, seed=3).images[0]
        moving = [start.rotate(3 * i % 360, resample=Image.Resampling.BILINEAR) for i in range(count)]
        rows = [_beside(pipeline, moving, steps) for steps in (1, 2, 4)]
        found = {"rows": rows, "growth_bytes": _growth(pipeline, moving, 10), "still": _still(pipeline, moving)}
    print(text.markdown_table(("steps", "stream, ms a frame", "frame by frame", "ratio"), [_shown(row) for row in rows]))
    print(f"memory after {10 * count} frames: {found['growth_bytes'] / 1e3:.0f} KB more than after {count}")
    still = found["still"]
    print(f"of {still['frames']} frames, half of them still, {still['repeated']} were not drawn: {still['faster']:.2f} times as fast")
    save("streaming", {"model": MODEL, "frames": count, "strength": STRENGTH, **found})


def _beside(pipeline: Pipeline, frames: list[Image.Image], steps: int) -> dict[str, Any]:
    stream = Stream(pipeline, PROMPT, steps=steps, strength=STRENGTH)
    times: dict[str, list[float]] = {"stream": [], "alone": []}
    timesteps = stream_timesteps(pipeline.sampling.schedule, steps, STRENGTH)
    for frame in frames:
        started = time.perf_counter()
        stream(frame)
        between = time.perf_counter()
        pipeline(PROMPT, image=frame, strength=1.0, timesteps=timesteps, sampler="lcm")
        times["stream"].append((between - started) * 1e3)
        times["alone"].append((time.perf_counter() - between) * 1e3)
    ratio = statistics.median(a / b for a, b in zip(times["stream"][steps:], times["alone"][steps:], strict=True))
    return {"steps": steps, **{f"{name}_ms": statistics.median(own[steps:]) for name, own in times.items()}, "ratio": ratio}


def _growth(pipeline: Pipeline, frames: list[Image.Image], rounds: int) -> int:
    stream, seen = Stream(pipeline, PROMPT, steps=2, strength=STRENGTH), []
    for _ in range(rounds):
        for frame in frames:
            stream(frame)
        seen.append(_resident_bytes())
    return seen[-1] - seen[0]


def _still(pipeline: Pipeline, frames: list[Image.Image]) -> dict[str, Any]:
    """Runs of ten frames that move and ten that do not."""
    halting = [frames[i - i % 20 if i % 20 >= 10 else i] for i in range(len(frames))]
    seconds, repeated = [], 0
    for alike in (None, SimilarityFilter()):
        stream = Stream(pipeline, PROMPT, steps=2, strength=STRENGTH, similarity=alike)
        started = time.perf_counter()
        drawn = [stream(frame) for frame in halting]
        seconds.append(time.perf_counter() - started)
        repeated = sum(frame.repeated for frame in drawn if frame is not None)
    return {"frames": len(halting), "repeated": repeated, "faster": seconds[0] / seconds[1]}


def _resident_bytes() -> int:
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024


def _shown(row: dict[str, Any]) -> list[str]:
    return [str(row["steps"]), f"{row['stream_ms']:.1f}", f"{row['alone_ms']:.1f}", f"{row['ratio']:.2f}"]


if __name__ == "__main__":
    main()
