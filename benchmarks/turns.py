"""What it is worth that ONNX Runtime's threads stop when a call is over: python benchmarks/turns.py CUT-FASHION CUT-FASHION-DIT

The bundles are float ones with the cuts of caching.py. Pictures of 20 steps without a cache, where one graph runs over and over, and
of 50 steps with one, where graphs take turns: with ONNX Runtime's own setting, by which threads spin after a call and wait for
the next, and with ours, by which they stop. Each way is a process of its own, and the two are woken in turn; a figure is the
least of three pictures, and what is shown is the median of the turns. Wants a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any
from unittest import mock

from _report import save

from edgediffusion import text
from edgediffusion.runtimes import Pipeline
from edgediffusion.runtimes.engines import _onnxruntime

WAYS, TURNS, PICTURES, GUIDANCE = ("spin", "stop"), 14, 3, 3.0
CASES = (
    ("fashion", 20, None),
    ("fashion", 50, "deepcache:interval=5,cut=up_blocks.2.resnets.1"),
    ("fashion", 50, "deepcache:interval=3,cut=up_blocks.1.resnets.1"),
    ("fashion-dit", 20, None),
    ("fashion-dit", 50, "taylorseer:interval=5,cut=transformer_blocks.0"),
    ("fashion-dit", 50, "fora:interval=3,cut=transformer_blocks.0"),
)
HEAD = ("pipeline", "steps", "cache", "spinning, ms", "stopped, ms", "ratio")


def main() -> None:
    if sys.argv[1] == "--worker":
        _work(*json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs=2)
    fashion, transformer = parser.parse_args().bundles
    rows = []
    for name, steps, cache in CASES:
        seconds = _in_turn({"fashion": fashion, "fashion-dit": transformer}[name], steps, cache)
        spin, stop = (1e3 * statistics.median(seconds[way]) for way in WAYS)
        ratio = statistics.median(b / a for a, b in zip(*seconds.values(), strict=True))
        rows.append({"pipeline": name, "steps": steps, "cache": cache, "spin_ms": spin, "stop_ms": stop, "ratio": ratio})
        print(rows[-1], flush=True)
    save("turns", {"guidance_scale": GUIDANCE, "turns": TURNS, "rows": rows})
    print(text.markdown_table(HEAD, [_shown(row) for row in rows]))


def _shown(row: dict[str, Any]) -> list[str]:
    cache = f"`{row['cache']}`" if row["cache"] else "none"
    return [row["pipeline"], str(row["steps"]), cache, f"{row['spin_ms']:.0f}", f"{row['stop_ms']:.0f}", f"{row['ratio']:.2f}"]


def _in_turn(bundle: str, steps: int, cache: str | None) -> dict[str, list[float]]:
    command = [sys.executable, __file__, "--worker"]
    workers = {
        way: subprocess.Popen([*command, json.dumps([way, bundle, steps, cache])], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for way in WAYS
    }
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    try:
        for turn in range(1 + TURNS):
            for way, worker in workers.items():
                assert worker.stdin is not None
                assert worker.stdout is not None
                worker.stdin.write("\n")
                worker.stdin.flush()
                took = float(worker.stdout.readline())
                if turn:
                    seconds[way].append(took)
    finally:
        for worker in workers.values():
            worker.kill()
    return seconds


def _work(way: str, bundle: str, steps: int, cache: str | None) -> None:
    ours = _onnxruntime.session_options

    def options(threads: int | None, *, optimize: bool) -> Any:
        found = ours(threads, optimize=optimize)
        if way == "spin":
            found.add_session_config_entry("session.force_spinning_stop", "0")
        return found

    with mock.patch("edgediffusion.runtimes.engines.onnxruntime.session_options", options):
        pipeline = Pipeline.from_bundle(bundle, cache=cache)
    for turn, _ in enumerate(sys.stdin):
        took = []
        for at in range(PICTURES):
            started = time.perf_counter()
            pipeline("a bag", num_inference_steps=steps, guidance_scale=GUIDANCE, seed=turn * PICTURES + at)
            took.append(time.perf_counter() - started)
        print(min(took), flush=True)


if __name__ == "__main__":
    main()
