"""What the loop costs beside its engines, and how fast it begins: python benchmarks/loop.py NAME=BUNDLE ... [--pictures N]

For each bundle (fashion, at 20 steps, guidance 3, one picture at a time):

    overhead    thread time of the Python around the engines, as a part of a picture's wall-clock time; aimed at 5 % and less
    growth      resident memory after 50 and after N pictures, of different seeds
    first       a new process: seconds until `Pipeline` is imported, and until the first picture is there
    apart       both rows of guidance in two calls instead of one: time of a picture, in turn
    overlap     decoding in a thread beside the next picture's steps, in turn with one after the other

and once, with engines that only wait as long as those of a UNet of Stable Diffusion 1.5's size, float16 conditions of its shape,
the overhead at that shape; aimed at 1 % and less. Times are worth something on a quiet machine only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from _report import save

from edgediffusion.bundle import Bundle, Component, NoiseSchedule, Sampling, TensorSpec
from edgediffusion.runtimes import Pipeline
from edgediffusion.runtimes.engines import NOT_SHARED, allocate

OPTIONS: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 3.0}
PROMPT = "a photo of a bag"
TURNS = 8  # of each of two ways that are compared
SD15_STEP_S = 0.5  # what the waiting engine takes: a twentieth of a step on two cores, to be hard on the loop
FIRST = """
import json, sys, time
begun = time.time() - float(sys.argv[2])
from edgediffusion.runtimes.pipeline import Pipeline
imported = time.time() - float(sys.argv[2])
Pipeline.from_bundle(sys.argv[1])("a photo of a bag", num_inference_steps=20, guidance_scale=3.0).images
print(json.dumps({"begun": begun, "imported": imported, "picture": time.time() - float(sys.argv[2])}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", metavar="NAME=BUNDLE")
    parser.add_argument("--pictures", type=int, default=500, help="for the growth of memory")
    given = parser.parse_args()
    named = dict(entry.split("=", 1) for entry in given.bundles)
    rows = {}
    for name, path in named.items():
        rows[name] = measured(Path(path), given.pictures)
        print(name, json.dumps(rows[name], indent=1), flush=True)
    shape = sd15()
    print("the shape of Stable Diffusion 1.5", json.dumps(shape))
    save("loop", {"options": OPTIONS, "load_average": round(os.getloadavg()[0], 1), "bundles": rows, "sd15_shape": shape})


def measured(bundle: Path, pictures: int) -> dict[str, Any]:
    first = [first_picture(bundle) for _ in range(5)]
    pipe = Pipeline.from_bundle(bundle)
    pipe(PROMPT, **OPTIONS)
    return {
        "overhead": overhead(pipe, lambda seed: pipe(PROMPT, seed=seed, **OPTIONS)),
        "first": {key: round(float(np.median([one[key] for one in first])), 3) for key in first[0]},
        "growth": growth(pipe, pictures),
        "apart": in_turn(
            lambda: pipe(PROMPT, **OPTIONS),
            lambda: pipe(PROMPT, guidance_batch="separate", **OPTIONS),
        ),
        "overlap": in_turn(lambda: after_each_other(pipe), lambda: overlapped(pipe)),
    }


class _Timed:
    """A session whose bindings add up the thread time of their runs."""

    def __init__(self, session: Any, spent: list[float]):
        self.inputs, self.outputs, self._session, self._spent = session.inputs, session.outputs, session, spent

    def bind(self, axes: Mapping[str, int], shared: Mapping[str, np.ndarray] = NOT_SHARED) -> Any:
        binding = self._session.bind(axes, shared)
        run = binding.run

        def timed() -> None:
            started = time.thread_time()
            run()
            self._spent[0] += time.thread_time() - started

        binding.run = timed
        return binding


def overhead(pipe: Pipeline, draw: Callable[[int], Any], runs: int = 30) -> dict[str, float]:
    """Thread time, since on a machine with other work wall-clock time of short pieces is mostly theirs."""
    spent = [0.0]
    timed = Pipeline(pipe.bundle, {graph.name: _Timed(graph.session, spent) for graph in _graphs(pipe)})
    timed(PROMPT, **OPTIONS)
    outside = []
    for seed in range(runs):
        spent[0], started = 0.0, time.thread_time()
        timed(PROMPT, seed=seed, **OPTIONS)
        outside.append(time.thread_time() - started - spent[0])
    walls = []
    for seed in range(runs):
        started = time.perf_counter()
        draw(seed)
        walls.append(time.perf_counter() - started)
    picture, beside = (1e3 * float(np.median(times)) for times in (walls, outside))
    return {"picture_ms": round(picture, 2), "outside_ms": round(beside, 2), "percent": round(100 * beside / picture, 2)}


def _graphs(pipe: Pipeline) -> list[Any]:
    """The graphs that the pipeline has opened."""
    decoder = pipe._autoencoder._decoder
    return [*pipe._graphs._graphs.values(), *(e._graph for e in pipe._conditions._encoders), *([decoder] if decoder else [])]


def growth(pipe: Pipeline, pictures: int) -> dict[str, float]:
    at = {}
    for i in range(pictures):
        pipe(PROMPT, seed=i, **OPTIONS)
        if i + 1 in (50, pictures):
            at[i + 1] = _resident_bytes()
    before, after = at[min(at)], at[max(at)]
    return {"pictures": pictures, "resident_mb": round(after / 1e6, 2), "grown_mb": round((after - before) / 1e6, 3)}


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def first_picture(bundle: Path) -> dict[str, float]:
    command = [sys.executable, "-c", FIRST, str(bundle), str(time.time())]
    found: dict[str, float] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return {"import_s": found["imported"] - found["begun"], "picture_s": found["picture"]}


def in_turn(one: Callable[[], Any], other: Callable[[], Any]) -> dict[str, float]:
    """Median milliseconds of both, and how many times as long the other takes."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(TURNS):
        for call, kept in zip((one, other), times, strict=True):
            started = time.perf_counter()
            call()
            kept.append(time.perf_counter() - started)
    first, second = (1e3 * float(np.median(kept)) for kept in times)
    return {"one_ms": round(first, 2), "other_ms": round(second, 2), "ratio": round(second / first, 3)}


def after_each_other(pipe: Pipeline, pictures: int = 6) -> None:
    for seed in range(pictures):
        *_, last = pipe.steps(PROMPT, seed=seed, **OPTIONS)
        pipe.decode(last.latents)


def overlapped(pipe: Pipeline, pictures: int = 6) -> None:
    """The decoder has buffers of its own, so one thread may decode while another one runs the denoiser."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for seed in range(pictures):
            *_, last = pipe.steps(PROMPT, seed=seed, **OPTIONS)
            if waiting is not None:
                waiting.result()
            waiting = pool.submit(pipe.decode, last.latents)
        assert waiting is not None
        waiting.result()


class _Waiting:
    """A session that computes nothing and takes its time."""

    def __init__(self, component: Component, seconds: float):
        self.inputs, self.outputs, self._seconds = component.inputs, component.outputs, seconds

    def bind(self, axes: Mapping[str, int], shared: Mapping[str, np.ndarray] = NOT_SHARED) -> Any:
        seconds = self._seconds

        class Binding:
            inputs = allocate(self.inputs, axes, shared)
            outputs = allocate(self.outputs, axes, shared)

            def run(self) -> None:
                time.sleep(seconds)

        return Binding()


def sd15() -> dict[str, float]:
    """512 x 512 pixels: the conditions are given, so that neither tokenizer nor encoder is needed."""
    latent = ("batch", 4, "height", "width")
    states = TensorSpec("encoder_hidden_states", "float32", ("batch", 77, 768))
    inputs = (TensorSpec("sample", "float32", latent), TensorSpec("timestep", "float32", ()), states)
    unet = Component("unet", "denoise", "", inputs, (TensorSpec("out_sample", "float32", latent),))
    schedule = NoiseSchedule("scaled_linear", 1000, 0.00085, 0.012, steps_offset=1, set_alpha_to_one=False)
    facts = Sampling("epsilon", "classifier-free", schedule, 4, 8, 0.18215, 0.0, 512, 512, 64, False, "ddim", 20, 7.5)
    pipe = Pipeline(Bundle(Path(), "", (unet,), facts, (), {}), {"unet": _Waiting(unet, SD15_STEP_S)})
    sample = np.zeros((1, 4, 64, 64), np.float32)
    given = {"encoder_hidden_states": np.zeros((1, 77, 768), np.float32)}
    outside = []
    for _ in range(3):
        started = time.thread_time()
        pipe.denoise(sample, given, unconditional=given, num_inference_steps=10)
        outside.append((time.thread_time() - started) / 10)
    beside = float(np.median(outside))
    return {"step_ms": 1e3 * SD15_STEP_S, "outside_ms": round(1e3 * beside, 3), "percent": round(100 * beside / SD15_STEP_S, 3)}


if __name__ == "__main__":
    main()
