"""What each part of the stack is worth, one table: python benchmarks/stack.py [fashion|fashion-dit] [--parts PARTS]

diffusers as it comes (float32, eager, 50 steps), the caches that others have for it, then ours: the float graphs, int8, caching
on top, and the few-step student. Every row is a process of its own, which is woken for one picture at a time, in turn: what disturbs
one disturbs all. Parts:

    make       the bundles and the other packages (from PyPI, in a folder of their own)
    time       median seconds of a picture, its ratio to diffusers', and the process's peak of memory
    quality    256 pictures of every row against those of diffusers from the same noise

What is made is kept in --folder. Parts that are there already are measured again; the table shows what is known.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _report import REFERENCE, RESULTS, save

from edgediffusion import text
from edgediffusion.bundle import Bundle
from edgediffusion.export import export
from edgediffusion.optimize.calibrate import calibrate
from edgediffusion.optimize.quantize import quantize
from edgediffusion.profiles import judges
from edgediffusion.profiles.quality import Reference

PARTS = ("make", "time", "quality")
PEERS = ("DeepCache==0.1.1", "cache-dit==1.5.3")
STEPS, GUIDANCE = 50, 3.0
PICTURES, BATCH = 256, 16
LOOKING = "adaptive-diffusion"  # decides by the pictures that it draws: they are drawn one by one
STUDENT = "fashion-lcm"
STUDENT_STEPS = 4

Row = dict[str, Any]


def rows_of(model: str, folder: Path) -> dict[str, Row]:
    """The rows by name; the first is what the others are measured against."""
    plain = {"kind": "diffusers", "source": str(REFERENCE / model), "steps": STEPS, "guidance_scale": GUIDANCE}
    ours = {"kind": "bundle", "steps": STEPS, "guidance_scale": GUIDANCE}
    float32, int8 = ({**ours, "bundle": str(folder / f"{model}-{kind}")} for kind in ("float32", "int8"))
    if model == "fashion-dit":
        plain |= {"class": "StableDiffusion3Pipeline"}
        return {
            "diffusers": plain,
            "diffusers + cache-dit, threshold 0.12": {**plain, "peer": "cache-dit", "threshold": 0.12},
            "ours, float32": float32,
            "ours, int8": int8,
            **{
                f"ours, int8, {cache}": {**int8, "cache": cache}
                for cache in ("first-block:threshold=0.12", "taylorseer:interval=5", "fora:interval=3")
            },
        }
    plain |= {"class": "StableDiffusionPipeline"}
    student = {**ours, "steps": STUDENT_STEPS}
    return {
        "diffusers": plain,
        "diffusers + DeepCache, interval 3": {**plain, "peer": "DeepCache", "interval": 3},
        "diffusers + DeepCache, interval 5": {**plain, "peer": "DeepCache", "interval": 5},
        "ours, float32": float32,
        "ours, int8": int8,
        **{f"ours, int8, {cache}": {**int8, "cache": cache} for cache in (f"deepcache:interval={n}" for n in (2, 3, 5))},
        **{f"ours, int8, {cache}": {**int8, "cache": cache} for cache in (f"{LOOKING}:threshold={t}" for t in (0.005, 0.01))},
        f"ours, student, {STUDENT_STEPS} steps": {**student, "bundle": str(folder / f"{STUDENT}-float32")},
        f"ours, student, {STUDENT_STEPS} steps, int8": {**student, "bundle": str(folder / f"{STUDENT}-int8")},
    }


CUTS = {"fashion": ("up_blocks.2.resnets.1",), "fashion-dit": ("transformer_blocks.0", "transformer_blocks.1"), STUDENT: ()}


def make(model: str, folder: Path) -> None:
    if not (folder / "peers").exists():
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder / "peers", *PEERS], check=True)
    for name in (model, STUDENT) if model == "fashion" else (model,):
        bundle = folder / f"{name}-float32"
        if not bundle.exists():
            export(REFERENCE / name, bundle, cuts=CUTS[name])
        if not (folder / f"{name}-int8").exists():
            steps = STUDENT_STEPS if name == STUDENT else STEPS
            state = calibrate(Bundle.open(bundle), output=folder / f"{name}-state", samples=256, steps=steps, guidance_scale=GUIDANCE)
            quantize(Bundle.open(bundle), state, folder / f"{name}-int8")


class Worker:
    """The process of a row."""

    def __init__(self, row: Row, folder: Path):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder / "peers"), os.environ.get("PYTHONPATH", "")])}
        script = Path(__file__).with_name("_stack_worker.py")
        self._process = subprocess.Popen(
            [sys.executable, script, json.dumps(row)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def draw(self, prompts: list[str], seeds: list[int], file: Path | None = None, **further: int) -> Row:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"prompts": prompts, "seeds": seeds, **({"file": str(file)} if file else {}), **further}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"A row's process ended: {self._process.args}")
        found: Row = json.loads(answer)
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def workers(rows: dict[str, Row], folder: Path) -> Iterator[dict[str, Worker]]:
    made: dict[str, Worker] = {}
    try:
        for name, row in rows.items():
            made[name] = Worker(row, folder)
        yield made
    finally:
        for worker in made.values():
            worker.close()


def time_rows(rows: dict[str, Row], folder: Path, runs: int) -> dict[str, Row]:
    """Seconds of ``runs`` pictures of each row, taken in turn, each after one that is not counted; peak memory after one picture."""
    prompt = judges.load("fashion").prompts[0]
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    with workers(rows, folder) as made:
        peaks = {name: worker.draw([prompt], [0])["peak_bytes"] for name, worker in made.items()}
        for run in range(runs):
            for name, worker in made.items():
                worker.draw([prompt], [0])  # a process that slept begins with cold threads and caches
                seconds[name].append(worker.draw([prompt], [1 + run])["seconds"])
    first = seconds[next(iter(rows))]
    return {
        name: {
            "seconds": statistics.median(own),
            "faster": statistics.median(a / b for a, b in zip(first, own, strict=True)),
            "peak_bytes": peaks[name],
        }
        for name, own in seconds.items()
    }


def score_rows(rows: dict[str, Row], folder: Path) -> dict[str, Row]:
    judge = judges.load("fashion")
    prompts = [judge.prompts[i % len(judge.prompts)] for i in range(PICTURES)]
    reference: Reference | None = None
    found: dict[str, Row] = {}
    for name, row in rows.items():
        with workers({name: row}, folder) as made, tempfile.TemporaryDirectory() as kept:
            parts = []
            batch = 1 if LOOKING in name else BATCH
            for at in range(0, PICTURES, batch):
                file = Path(kept) / f"{at}.npy"
                made[name].draw(prompts[at : at + batch], list(range(10_000 + at, 10_000 + at + batch)), file)
                parts.append(np.load(file))
        pixels = np.clip(np.concatenate(parts), 0, 1)
        if reference is None:
            reference = Reference(pixels, prompts=prompts, judge=judge)
        quality = reference.measure(pixels)
        frechet, agreement = quality.set("frechet"), quality.set("agreement")
        found[name] = {"frechet": frechet.value, "frechet_relative": frechet.relative, "agreement": agreement.value}
        if row["steps"] == STEPS:  # another number of steps is another picture
            found[name] |= {"psnr": quality.pair("psnr").median, "psnr_p10": quality.pair("psnr").tenth}
        print(name, found[name], flush=True)
    return found


def shown(model: str, found: dict[str, Row]) -> list[list[str]]:
    rows = []
    first = next(iter(found))
    for name, row in found.items():
        psnr = f"{row['psnr']:.1f}" if "psnr" in row and name != first else "-"
        time = [f"{row['seconds']:.3f}", f"{row['faster']:.1f} x", f"{row['peak_bytes'] / 1e6:.0f} MB"] if "seconds" in row else ["-"] * 3
        quality = [psnr, f"{row['frechet']:.1f}", f"{row['agreement']:.1%}"] if "frechet" in row else ["-"] * 3
        rows.append([model, name, *time, *quality])
    return rows


HEAD = ("model", "row", "s / picture", "faster", "peak memory", "PSNR median", "Fréchet", "agreement")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=("fashion", "fashion-dit"), default="fashion")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to do, of: " + ",".join(PARTS))
    parser.add_argument("--folder", type=Path, help="where what is made is kept; a temporary folder by default")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--only", default="", help="measure only rows that have this in their name, and the first")
    given = parser.parse_args()
    name = f"stack_{given.model.replace('-', '_')}"
    file = RESULTS / f"{name}.json"
    with tempfile.TemporaryDirectory(dir=REFERENCE.parent, prefix=".stack-") as temporary:  # links do not cross file systems
        folder = (given.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        rows = rows_of(given.model, folder)
        known: dict[str, Row] = json.loads(file.read_text())["rows"] if file.is_file() else {}
        found = {row: known.get(row, {}) for row in rows}
        make(given.model, folder)
        chosen = {row: facts for at, (row, facts) in enumerate(rows.items()) if at == 0 or given.only in row}
        for part, measure in (("time", lambda: time_rows(chosen, folder, given.runs)), ("quality", lambda: score_rows(chosen, folder))):
            if part in given.parts.split(","):
                for row, figures in measure().items():
                    found[row] |= figures
                save(name, {"steps": STEPS, "guidance_scale": GUIDANCE, "pictures": PICTURES, "rows": found})
    print(text.markdown_table(HEAD, shown(given.model, {row: figures for row, figures in found.items() if figures})))


if __name__ == "__main__":
    main()
