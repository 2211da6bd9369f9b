"""What each method of quantizing does to the pictures of a shipped pipeline: python benchmarks/quantization.py fashion

Every row is a bundle that ONNX Runtime ran: 256 pictures of the judge's prompts, the bundle's own sampler, 20 steps, guidance
3, against the float pipeline from the same noise. The naive rows quantize every layer with the observed minima and maxima and
one scale for a tensor. The methods are added one after the other:

* ends: the first, the last and the time embedding's layers stay float
* channels: a range for each output channel (passes/insert_qdq.py)
* balance: factors for input channels, chosen by expected error
* mse: ranges and weight scales with the least squared error
* gptq: rounding that makes up for what it loses
* adaround: instead, learned rounding up or down, learned steps of activations and biases
* straight-through: instead, learned codes, and learned steps of weights too

With ``--strategies``, the calibration strategies are compared instead, with everything of the above but learning; with ``--papers``,
what papers have for unequal channels, each beside balance none and search: ends, channels, mse and rounding to nearest in all rows.
With ``--formats``, number formats and ranges at run time, each with ends and without balance, on matrix products alone: NVFP4 and ranges
at run time are for these. What has no kernels in ONNX Runtime runs as simulated (optimize/placements/simulated.toml).
Rows that are in the results already are not measured again; ``--fresh`` begins anew. ``emoji`` is not shipped:
training/README.md says how it is made, and since nothing judges emoji, its rows have no Fréchet distances and no agreement.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from _report import REFERENCE, RESULTS, save

from edgediffusion import registry, text
from edgediffusion.bundle import Bundle
from edgediffusion.cli._progress import Progress
from edgediffusion.export import export
from edgediffusion.export.source import Source
from edgediffusion.optimize import quantize
from edgediffusion.optimize.calibrate import read_prompts, state_of
from edgediffusion.optimize.items import Drawing, Drawn, draw_items
from edgediffusion.optimize.observe import observe
from edgediffusion.optimize.recipe import Placement, Recipe, load_placement, with_preset
from edgediffusion.profiles import judges
from edgediffusion.profiles.quality import Quality, Reference
from edgediffusion.runtimes import Pipeline

EMOJI = REFERENCE.parent.parent / "training" / "runs" / "emoji" / "pipeline"
PICTURES, BATCH, STEPS, GUIDANCE, SAMPLES = 256, 16, 20, 3.0, 256
FORMATS = {"W8A8": ("int8", "int8"), "W4A8": ("int4", "int8"), "W4A4": ("int4", "int4")}
METHODS = ("naive", "+ ends", "+ channels", "+ balance", "+ mse", "+ gptq", "+ adaround", "+ straight-through")
_Case = tuple[str, str, Recipe, Placement, str]
HEAD = ("model", "format", "method", "PSNR median", "p10", "worst", "SSIM", "Fréchet", "of float", "agreement", "of float")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("fashion", "fashion-dit", "emoji"))
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--strategies", dest="kind", action="store_const", const="strategies")
    kinds.add_argument("--papers", dest="kind", action="store_const", const="papers")
    kinds.add_argument("--formats", dest="kind", action="store_const", const="formats")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--quick", action="store_true", help="leave out the methods that learn, which take minutes each")
    parser.add_argument("--only", default="", help="measure rows with that in their format and method")
    arguments = parser.parse_args()
    cases = {"methods": _methods, "strategies": _strategies, "papers": _papers, "formats": _formats}[kind := arguments.kind or "methods"]()
    every = cases
    if arguments.quick:
        cases = [case for case in cases if case[2].rounding in ("nearest", "gptq")]
    cases = [case for case in cases if arguments.only in f"{case[0]} {case[1]}"]
    name = f"quantization_{kind}_{arguments.model.replace('-', '_')}"
    known = {} if arguments.fresh else _known(name)
    with tempfile.TemporaryDirectory(dir=REFERENCE.parent, prefix=".quantization-") as folder:  # links do not cross file systems
        for row in _rows(_Bench(arguments.model, Path(folder)), cases, known):
            known[row["format"], row["method"]] = row
            rows = _ordered(known, every)
            save(name, {"pictures": PICTURES, "steps": STEPS, "guidance_scale": GUIDANCE, "samples": SAMPLES, "rows": rows})
    print(text.markdown_table(HEAD, [shown(row) for row in _ordered(known, every)]))


def shown(row: dict[str, Any]) -> list[str]:
    """A row of the table."""

    def interval(score: dict[str, Any], digits: int) -> str:
        return f"{score['value']:.{digits}f} ({score['low']:.{digits}f}..{score['high']:.{digits}f})"

    cells = [row["model"], row["format"], row["method"], interval(row["psnr"], 1), f"{row['p10']:.1f}", f"{row['worst']:.1f}"]
    cells.append(f"{row['ssim']:.3f}")
    if "frechet" not in row:
        return [*cells, *[""] * (len(HEAD) - len(cells))]
    cells += [interval(row["frechet"], 1), f"{row['frechet_float']:.1f}"]
    return [*cells, f"{row['agreement']:.1%}", f"{row['agreement_float']:.1%}"]


def _known(name: str) -> dict[tuple[str, str], dict[str, Any]]:
    file = RESULTS / f"{name}.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    return {(row["format"], row["method"]): row for row in rows}


def _ordered(known: dict[tuple[str, str], dict[str, Any]], cases: Sequence[_Case]) -> list[dict[str, Any]]:
    return [known[case[:2]] for case in cases if case[:2] in known]


class _Bench:
    """One pipeline: its float bundle, its pictures, and what a quantized one of it scores."""

    def __init__(self, model: str, folder: Path):
        self.model, self.folder = model, folder
        self.source = Source.open(_pipeline(model))
        judge = None if model == "emoji" else judges.load("fashion")
        self.few_prompts = judge.prompts if judge else read_prompts(self.source.path)
        self.prompts = [self.few_prompts[i % len(self.few_prompts)] for i in range(PICTURES)]
        with Progress() as progress:
            self.bundle = export(self.source.path, folder / "float32", progress=progress)
        self.reference = Reference(self._draw(self.bundle), prompts=self.prompts, judge=judge)
        self._items: dict[str, Drawn] = {}
        self._observed: dict[tuple[object, ...], Any] = {}

    def items(self, strategy: str) -> Drawn:
        if strategy not in self._items:
            drawing = Drawing(strategy, SAMPLES, STEPS, guidance_scale=GUIDANCE)
            with Progress() as progress:
                self._items[strategy] = draw_items(self.bundle, self.few_prompts, drawing, progress=progress)
        return self._items[strategy]

    def score(self, recipe: Recipe, placement: Placement, strategy: str) -> dict[str, Any]:
        drawn = self.items(strategy)
        key = (strategy, recipe.split, recipe.rotate)
        with Progress() as progress, self._remembered(key):
            state = state_of(self.bundle, self.source, drawn, recipe, progress=progress)
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            quantized = quantize(self.bundle, state, Path(folder) / "quantized", placement=placement)
            quality = self.reference.measure(self._draw(quantized))
        return _figures(quality)

    @contextlib.contextmanager
    def _remembered(self, key: tuple[object, ...]) -> Iterator[None]:
        """Observe once for all rows of the same items and layers: it takes minutes, and what is seen does not depend on the method."""
        with mock.patch("edgediffusion.optimize.observe.observe", lambda *a, **k: self._seen(key, observe, *a, **k)):
            yield

    def _seen(self, key: tuple[object, ...], watch: Callable[..., Any], module: Any, items: Any, **more: Any) -> Any:
        key = (*key, len(items), items[0][0])  # a stage's items are a part of all
        if key not in self._observed:
            self._observed[key] = watch(module, items, **more)
        return self._observed[key]

    def _draw(self, bundle: Bundle) -> np.ndarray:
        pipeline, parts = Pipeline.from_bundle(bundle), []
        for at in range(0, PICTURES, BATCH):
            part, seeds = self.prompts[at : at + BATCH], range(10_000 + at, 10_000 + at + BATCH)
            parts.append(pipeline(part, num_inference_steps=STEPS, guidance_scale=GUIDANCE, seed=seeds).pixels)
        return np.concatenate(parts)


def _pipeline(model: str) -> Path:
    if model != "emoji":
        return REFERENCE / model
    if not EMOJI.exists():
        sys.exit("'emoji' is not shipped. Train it first, in two hours of a core: training/README.md says how.")
    return EMOJI


def _figures(quality: Quality) -> dict[str, Any]:
    pairs, sets = {score.metric: score for score in quality.pairs}, {score.metric: score for score in quality.sets}
    psnr = pairs["psnr"]
    found: dict[str, Any] = {
        "psnr": {"value": psnr.median, "low": psnr.low, "high": psnr.high},
        "p10": psnr.tenth,
        "worst": psnr.worst,
        "ssim": pairs["ssim"].median,
    }
    if sets:  # what a judge gives
        frechet, agreement = sets["frechet"], sets["agreement"]
        found["frechet"] = {"value": frechet.value, "low": frechet.low, "high": frechet.high}
        found["frechet_float"] = frechet.reference
        found["agreement"], found["agreement_float"] = agreement.value, agreement.reference
    return found


def _rows(bench: _Bench, cases: Sequence[_Case], known: dict[tuple[str, str], Any]) -> Iterator[dict[str, Any]]:
    for format_name, method, recipe, placement, strategy in cases:
        if (format_name, method) not in known:
            yield {"model": bench.model, "format": format_name, "method": method, **bench.score(recipe, placement, strategy)}


def _methods() -> Sequence[_Case]:
    usual = load_placement("onnxruntime_cpu")
    cases = []
    for name, formats in FORMATS.items():
        recipe, placement = Recipe(name, *formats, balance="none"), replace(usual, channel_scales=False)
        for method in METHODS:
            if method == "+ ends":
                recipe = with_preset(recipe, "ends")
            elif method == "+ channels":
                placement = usual
            elif method == "+ balance":
                recipe = replace(recipe, balance="search")
            elif method == "+ mse":
                recipe = replace(recipe, ranges="mse")
            elif method != "naive":
                recipe = replace(recipe, rounding=method.removeprefix("+ "))
            if not (name == "W8A8" and METHODS.index(method) > METHODS.index("+ balance")):  # of no effect on 8 bits
                cases.append((name, method, recipe, placement, "uniform"))
    return cases


def _strategies() -> Sequence[_Case]:
    recipes = {n: with_preset(Recipe(n, *FORMATS[n], ranges="mse"), "ends") for n in ("W8A8", "W4A8")}
    placement = load_placement("onnxruntime_cpu")
    return [(n, s, recipe, placement, s) for n, recipe in recipes.items() for s in registry.names("optimize.calibration")]


def _papers() -> Sequence[_Case]:
    ways: dict[str, dict[str, Any]] = {
        "none": {},
        "split shortcuts (Q-Diffusion)": {"split": ("conv_shortcut$",)},
        "smoothquant (NVIDIA)": {"balance": "smoothquant"},
        "mean over steps (NVIDIA)": {"ranges": "step-mean"},
        "csb (PTQ4DiT)": {"balance": "csb"},
        "ditas": {"balance": "ditas"},
        "rotation (HQ-DiT)": {"rotate": ("",)},
        "search (ours)": {"balance": "search"},
        "search, 2 stages (APQ-DM, TDQ)": {"balance": "search", "stages": 2},
        "search, rank 32 (SVDQuant)": {"balance": "search", "rank": 32},
    }
    placement, cases = load_placement("onnxruntime_cpu"), []
    for name, formats in FORMATS.items():
        recipe = with_preset(Recipe(name, *formats, balance="none", ranges="mse"), "ends")
        for way, changes in ways.items():
            if not (name == "W8A8" and "rank" in changes):  # a branch is for weights of few bits
                cases.append((name, way, replace(recipe, **changes), placement, "uniform"))
    return cases


CONVOLUTIONS = ("conv", r"attentions\.\d+\.proj_(in|out)$")  # of the UNet; the transformer has none but the first layer


def _formats() -> Sequence[_Case]:
    token, group = {"dynamic": "token"}, {"dynamic": "token", "group": 32}
    chosen = {"ranges": "mse"}
    ways: list[tuple[str, str, str, str, dict[str, Any]]] = [
        ("W8A8", "int8", "int8", "int8", {}),
        ("W8A8", "int8, by tensor at run time", "int8", "int8", {"dynamic": "tensor"}),
        ("W8A8", "int8, by token at run time", "int8", "int8", token),
        ("W8A8", "int8, by token and 32 channels at run time", "int8", "int8", group),
        ("W8A8", "E4M3 (fp8)", "fp8", "fp8", {}),
        ("W4A4", "int4", "int4", "int4", {}),
        ("W4A4", "E2M1", "e2m1", "e2m1", {}),
        ("W4A4", "E3M0", "e3m0", "e3m0", {}),
        ("W4A4", "E1M2", "e1m2", "e1m2", {}),
        ("W4A4", "FP4 by layer", "fp4", "fp4", {}),
        ("W4A4", "NVFP4", "nvfp4", "nvfp4", {}),
        ("W4A4", "int4, by token at run time", "int4", "int4", token),
        ("W4A4", "int4, by token and 32 channels at run time", "int4", "int4", group),
        ("W4A4", "the same, gptq (Q-DiT)", "int4", "int4", {**group, "rounding": "gptq"}),
        ("W4A4", "int4, mse", "int4", "int4", chosen),
        ("W4A4", "FP4 by layer, mse", "fp4", "fp4", chosen),
        ("W4A4", "the same, rotated (HQ-DiT)", "fp4", "fp4", {**chosen, "rotate": ("",)}),
        ("W4A4", "NVFP4, rank 32 (SVDQuant)", "nvfp4", "nvfp4", {"balance": "smoothquant", "rank": 32}),
        ("W4A16", "int4, scales for 16 inputs", "int4", "float", {"group": 16}),
        ("W4A16", "NVFP4", "nvfp4", "float", {}),
    ]
    integers, simulated = load_placement("onnxruntime_cpu"), load_placement("simulated")
    cases = []
    for name, method, weights, activations, changes in ways:
        recipe = replace(Recipe(name, weights, activations, balance="none", exclude=CONVOLUTIONS), **changes)
        placement = integers if weights.startswith("int") else simulated
        cases.append((name, method, with_preset(recipe, "ends"), placement, "uniform"))
    return cases


if __name__ == "__main__":
    main()
