"""The whole way on the shipped pipeline: export, calibrate, quantize, build, draw with both bundles, one table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import edgediffusion
from edgediffusion import bundle as bundles
from edgediffusion.bundle import Bundle
from edgediffusion.files import new_folder
from edgediffusion.text import size, table

SOURCE = Path(edgediffusion.__file__).parent / "reference" / "fashion"
TARGET = "cpu-x86-64"
STEPS, GUIDANCE, SEED = 20, 3.0, 0
CALIBRATION_ITEMS = 128
BATCH = 16
_ITEMS = ("t-shirt", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot", "trousers")
_OTHER_WORDS = ("tee", "sweater", "jacket", "running shoe", "handbag", "boot")
_TONES = ("", "dark ", "grey ", "bright ")

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Row:
    """One component in both bundles; times are medians of calls taken in turn."""

    component: str
    float_ms: float
    int8_ms: float
    ratio: float
    float_bytes: int
    int8_bytes: int


@dataclass(frozen=True)
class Demo:
    """What the demo found. PSNR is of the int8 pictures to the float ones, over ``prompts`` prompts."""

    rows: tuple[Row, ...]
    float_peak_bytes: int
    int8_peak_bytes: int
    psnr_median_db: float
    psnr_p10_db: float
    psnr_min_db: float
    prompts: int
    steps: int
    guidance_scale: float
    machine: str
    folder: str

    def __str__(self) -> str:
        return f"{self.table()}\n\n{self.summary()}"

    def table(self) -> str:
        head = ["component", "float ms", "int8 ms", "ratio", "float size", "int8 size", "float peak", "int8 peak", "PSNR"]
        rows = [
            [r.component, f"{r.float_ms:.2f}", f"{r.int8_ms:.2f}", f"{r.ratio:.2f}", size(r.float_bytes), size(r.int8_bytes), "", "", ""]
            for r in self.rows
        ]
        rows[-1][6:] = [size(self.float_peak_bytes), size(self.int8_peak_bytes), f"{self.psnr_median_db:.1f} dB"]
        return table(head, rows)

    def summary(self) -> str:
        return (
            f"PSNR of int8 to float pictures over {self.prompts} prompts: median {self.psnr_median_db:.1f} dB, "
            f"10th percentile {self.psnr_p10_db:.1f} dB, lowest {self.psnr_min_db:.1f} dB\n"
            f"{self.steps} steps, guidance {self.guidance_scale:g}; a picture is encode + {self.steps} x denoise + decode\n"
            f"machine: {self.machine}\n"
            f"pictures, bundles and this table as JSON: {self.folder}"
        )


def demo(output: Path, progress: Progress) -> Demo:
    """Make ``output`` with ``float32/``, ``int8/``, ``contact-sheet.png``, ``state`` and ``table.json``.

    Raises:
        OutputError: ``output`` exists. MissingExtra: the extra ``optimize`` is not installed.
    """
    with new_folder(output) as folder:
        pair = _bundles(folder, progress)
        psnr = _draw(pair, folder, progress)
        result = _measure(pair, psnr, output, progress)
        (folder / "table.json").write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")
    return result


def prompts() -> list[str]:
    """64 prompts: every item in every tone; the first ten are the ten kinds of things, plain."""
    return [f"a photo of {_with_article(tone + item)}" for tone in _TONES for item in (*_ITEMS, *_OTHER_WORDS)]


def _with_article(words: str) -> str:
    if words.endswith("trousers"):
        return words
    return ("an " if words[0] in "aeiou" else "a ") + words


def _bundles(folder: Path, progress: Progress) -> tuple[Bundle, Bundle]:
    """The built float and int8 bundles; what lies between is removed."""
    from edgediffusion.export import export
    from edgediffusion.optimize import calibrate, quantize
    from edgediffusion.runtimes.build import build

    between = folder / "between"
    exported = export(SOURCE, between / "float32", progress=progress)
    state = folder / "state"
    calibrate(
        exported,
        source=SOURCE,
        strategy="ndtc",
        samples=CALIBRATION_ITEMS,
        steps=STEPS,
        seed=SEED,
        guidance_scale=GUIDANCE,
        prompts=prompts(),
        output=state,
        progress=progress,
    )
    quantized = quantize(exported, state, between / "int8", target=TARGET, progress=progress)
    pair = tuple(build(b, folder / name, target=TARGET, progress=progress) for name, b in (("float32", exported), ("int8", quantized)))
    shutil.rmtree(between)
    return pair[0], pair[1]


def _draw(pair: Sequence[Bundle], folder: Path, progress: Progress) -> np.ndarray:
    """Draw every prompt with both bundles from the same noise; writes the contact sheet, returns PSNR for each prompt."""
    from edgediffusion.profiles.quality import psnr_db
    from edgediffusion.profiles.report import contact_sheet
    from edgediffusion.runtimes import Pipeline

    pipelines = [Pipeline.from_bundle(bundle) for bundle in pair]
    wanted = prompts()
    psnr: list[float] = []
    shown: list[list[Any]] = []
    for start in range(0, len(wanted), BATCH):
        part = wanted[start : start + BATCH]
        drawn = []
        for at, pipeline in enumerate(pipelines):
            progress("drawing", (start + at * len(part) / 2) / len(wanted))
            drawn.append(pipeline(part, num_inference_steps=STEPS, guidance_scale=GUIDANCE, seed=SEED + start))
        psnr += [psnr_db(b, a) for a, b in zip(drawn[0].pixels, drawn[1].pixels, strict=True)]
        shown = shown or [d.images[: len(_ITEMS)] for d in drawn]
    progress("drawing", 1.0)
    contact_sheet(shown, ("float32", "int8"), _ITEMS).save(folder / "contact-sheet.png")
    return np.array(psnr)


def _measure(pair: tuple[Bundle, Bundle], psnr: np.ndarray, output: Path, progress: Progress) -> Demo:
    from edgediffusion.profiles import latency, machine, memory

    times = latency.measure(pair, runs=50, warmup=5, progress=progress)
    peaks = [memory.measure(bundle).peak_bytes for bundle in pair]
    rows = tuple(
        Row(name, f.median_ms, q.median_ms, q.median_ms / f.median_ms, _engine_bytes(pair[0], name), _engine_bytes(pair[1], name))
        for (name, f), q in zip(times[0].items(), times[1].values(), strict=True)
        if pair[0].component(name).role in ("encode", "denoise", "decode")
    )
    return Demo(
        rows=rows,
        float_peak_bytes=peaks[0],
        int8_peak_bytes=peaks[1],
        psnr_median_db=float(np.median(psnr)),
        psnr_p10_db=float(np.percentile(psnr, 10)),
        psnr_min_db=float(psnr.min()),
        prompts=len(psnr),
        steps=STEPS,
        guidance_scale=GUIDANCE,
        machine=machine(),
        folder=str(output),
    )


def _engine_bytes(bundle: bundles.Bundle, component: str) -> int:
    return bundle.size_bytes(f"engines/{TARGET}/{component}.")
