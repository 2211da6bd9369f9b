"""The same model and bits with other tools, in one run, against ours: python benchmarks/other_quantizers.py fashion

Every tool gets the same float32 graph and the same 256 calibration items, quantizes to W8A8 as its own documents say
(_peers.py), and runs on the engine it is made for. ModelOpt in torch, W8A8 and W4A8, is drawn with as its own modules simulate it
(_peers_torch.py): these have no time and no size. Quality: pictures of the judge's prompts, the bundle's own sampler, 20 steps,
guidance 3, against the float pipeline's from the same noise. Latency: one guided step of one picture (two rows), all variants in
turn in one process; ratios of medians are to float32 on ONNX Runtime.

ONNX Runtime runs others' graphs as it runs ours (without MatMulAddFusion), with all of its optimizers, and without
QDQPropagationTransformer; the fastest counts.
The tools live in an environment of their own, which is made under ``--work`` (1.6 GB) beside the graphs and items; a later run
finds them there. Rows that are in the results already are not drawn again; ``--fresh`` begins anew, ``--timing`` only times.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import _peers
import numpy as np
from _peers_engines import ENGINES, open_foreign, plain_graph, use_library
from _peers_torch import TorchSession, quantized
from _report import REFERENCE, RESULTS, save
from quantization import BATCH, GUIDANCE, SAMPLES, STEPS, _figures

from edgediffusion import registry, text
from edgediffusion.bundle import Bundle
from edgediffusion.cli._progress import Progress
from edgediffusion.errors import EngineError
from edgediffusion.export import export
from edgediffusion.export.source import Source
from edgediffusion.files import new_folder
from edgediffusion.optimize import quantize
from edgediffusion.optimize.calibrate import state_of
from edgediffusion.optimize.fold import fold
from edgediffusion.optimize.items import Drawing, Drawn, draw_items
from edgediffusion.optimize.recipe import load_placement, load_recipe
from edgediffusion.optimize.sensitivity import sensitivity
from edgediffusion.profiles import judges
from edgediffusion.profiles.latency import _time_in_turn
from edgediffusion.profiles.quality import Reference
from edgediffusion.runtimes import Pipeline
from edgediffusion.runtimes.engines import Binding
from edgediffusion.runtimes.graph import open_graphs

HEAD = ("model", "tool", "engine", "PSNR median", "worst", "SSIM", "Fréchet", "agreement", "step", "p10..p90", "size")
FLOAT = ("float32", "onnxruntime")


@dataclass(frozen=True)
class Variant:
    """A quantized denoiser: ``maker`` is a tool of _peers.py, one of our recipes on a placement (``recipe@placement``, with what else
    is done to it: ``recipe+sensitivity+fold@placement``), or for the engine ``torch`` a setting of _peers_torch.py."""

    tool: str
    maker: str
    engine: str

    @property
    def key(self) -> tuple[str, str]:
        return self.tool, self.engine


VARIANTS = (
    Variant("float32", "", "onnxruntime"),
    Variant("float32", "", "openvino bf16"),
    Variant("float32", "", "openvino f32"),
    Variant("edgediffusion int8", "int8@onnxruntime-cpu", "onnxruntime"),
    Variant("edgediffusion int8, fold", "int8+fold@onnxruntime-cpu", "onnxruntime"),
    Variant("edgediffusion int8, sensitivity, fold", "int8+sensitivity+fold@onnxruntime-cpu", "onnxruntime"),
    Variant("edgediffusion int8 and float, fold", "int8-float+fold@onnxruntime-cpu", "onnxruntime"),
    Variant("edgediffusion int8", "int8@openvino", "openvino bf16"),
    Variant("edgediffusion int8", "int8@openvino", "openvino f32"),
    Variant("onnxruntime static, MinMax", "onnxruntime-minmax", "onnxruntime"),
    Variant("onnxruntime static, MinMax, layers alone", "onnxruntime-layers", "onnxruntime"),
    Variant("onnxruntime static, Percentile", "onnxruntime-percentile", "onnxruntime"),
    Variant("nncf, of ONNX", "nncf-onnx", "onnxruntime"),
    Variant("nncf, of OpenVINO", "nncf-openvino", "openvino bf16"),
    Variant("nncf, of OpenVINO", "nncf-openvino", "openvino f32"),
    Variant("modelopt, entropy", "modelopt-entropy", "onnxruntime"),
    Variant("modelopt, max", "modelopt-max", "onnxruntime"),
    Variant("modelopt in torch, max", "w8a8-max", "torch"),
    Variant("modelopt in torch, SmoothQuant", "w8a8-smoothquant", "torch"),
    Variant("W4A8: modelopt in torch, max", "w4a8-max", "torch"),
    Variant("W4A8: modelopt in torch, mse", "w4a8-mse", "torch"),
    Variant("W4A8: modelopt in torch, AWQ", "w4a8-awq", "torch"),
    Variant("W4A8: modelopt in torch, SVDQuant", "w4a8-svdquant", "torch"),
    Variant("W4A8: edgediffusion, gptq", "w4a8-gptq@onnxruntime-cpu", "onnxruntime"),
    Variant("W4A8: edgediffusion w4a8", "w4a8@onnxruntime-cpu", "onnxruntime"),
)
RECIPES = {  # beside those that ship
    "w4a8-gptq": replace(load_recipe("w4a8"), rounding="gptq"),
}
MIXED_BITS = {"fashion": 10.5, "fashion-dit": 12.0}  # of int8-float: those that stay float anyway make 8.7 and 10.9 of it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("fashion", "fashion-dit"))
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--runs", type=int, default=120, help="timed steps of each variant")
    parser.add_argument("--work", type=Path, help="where environment, graphs and items are made and found again; else a temporary folder")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--timing", action="store_true", help="time the variants, and leave their pictures as they are in the results")
    parts.add_argument("--pictures-only", action="store_true", help="draw what is not in the results, and leave times as they are there")
    parser.add_argument("--only", default="", help="variants whose tool has this text in its name")
    parser.add_argument("--fresh", action="store_true")
    arguments = parser.parse_args()
    name = f"other_quantizers_{arguments.model.replace('-', '_')}"
    facts = {"pictures": arguments.pictures, "steps": STEPS, "guidance_scale": GUIDANCE, "samples": SAMPLES, "packages": _peers.PACKAGES}
    rows = {} if arguments.fresh else _known(name, arguments.pictures)
    with tempfile.TemporaryDirectory() as folder:
        bench = _Bench(arguments.model, (arguments.work or Path(folder)).resolve(), arguments.pictures)
        wanted = [v for v in bench.variants if arguments.only in v.tool]
        for variant in [] if arguments.timing else [v for v in wanted if v.key not in rows]:
            rows[variant.key] = {"model": arguments.model, "tool": variant.tool, "engine": variant.engine, **bench.score(variant)}
            save(name, {**facts, "rows": _ordered(rows)})
        timed = [] if arguments.pictures_only else [v for v in bench.variants if "bytes" in rows.get(v.key, {})]
        for key, step in bench.times(timed, arguments.runs).items() if timed else ():
            rows[key]["step"] = step
    save(name, {**facts, "runs": arguments.runs, "rows": _ordered(rows)})
    print(text.markdown_table(HEAD, [shown(row) for row in _ordered(rows)]))


def shown(row: Mapping[str, Any]) -> list[str]:
    """A row of the table."""
    cells = [row["model"], row["tool"] + (f" ({row['version']})" if row.get("version") else ""), row["engine"]]
    if "failed" in row:
        return [*cells, row["failed"], *[""] * (len(HEAD) - 4)]
    psnr, frechet = row["psnr"], row["frechet"]
    if psnr["value"] > 100:  # the float pipeline itself, or another engine's rounding
        cells += ["> 100", "> 100"]
    else:
        cells += [f"{psnr['value']:.1f} ({psnr['low']:.1f}..{psnr['high']:.1f})", f"{row['worst']:.1f}"]
    cells += [f"{row['ssim']:.4f}", f"{frechet['value']:.1f} ({frechet['low']:.1f}..{frechet['high']:.1f})", f"{row['agreement']:.1%}"]
    step = row.get("step")
    times = ["", ""] if step is None else [f"{step['ratio']:.2f}", f"{step['p10']:.2f}..{step['p90']:.2f}"]
    return [*cells, *times, text.size(row["bytes"]) if "bytes" in row else ""]


def _known(name: str, pictures: int) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows that are there already, of as many pictures."""
    file = RESULTS / f"{name}.json"
    found = json.loads(file.read_text()) if file.exists() else {"pictures": 0}
    return {(row["tool"], row["engine"]): row for row in found["rows"]} if found["pictures"] == pictures else {}


def _ordered(rows: Mapping[tuple[str, str], dict[str, Any]]) -> list[dict[str, Any]]:
    return [rows[variant.key] for variant in VARIANTS if variant.key in rows]


class _Bench:
    """One pipeline: its float bundle and plain graph, its items, and what a quantized denoiser of it scores."""

    def __init__(self, model: str, work: Path, pictures: int):
        self.model, self.work, self.pictures = model, work / model, pictures
        self.judge = judges.load("fashion")
        self.prompts = [self.judge.prompts[i % len(self.judge.prompts)] for i in range(pictures)]
        self._environment = work / "environment"
        with Progress() as progress:
            bundle = self.work / "bundle"
            self.bundle = Bundle.open(bundle) if bundle.exists() else self._export(bundle, progress)
        (self.denoiser,) = self.bundle.with_role("denoise")
        sessions = open_graphs(self.bundle, ("encode", "decode"), target="onnx", threads=None)
        self._others = {graph.name: graph.session for graph in sessions}
        placements = {name.replace("_", "-") for name in registry.names("optimize.placements", ".toml")}
        self.variants = tuple(v for v in VARIANTS if "@" not in v.maker or v.maker.split("@")[1] in placements)

    @cached_property
    def _python(self) -> Path:
        """The tools' environment."""
        with Progress() as progress:
            progress("making the tools' environment", 0.0)
            return _peers.environment(self._environment)

    @cached_property
    def _reference(self) -> Reference:
        return Reference(self._draw(self._float, VARIANTS[0]), prompts=self.prompts, judge=self.judge)

    def score(self, variant: Variant) -> dict[str, Any]:
        """Pictures' figures, the bytes of the graph with its weights, and the tool's version; or why there are none."""
        if variant.engine == "torch":
            return self._score_torch(variant)
        if variant.engine.startswith("openvino"):
            use_library(self._python)
        try:
            graph, made = self.made(variant)
            pixels = self._draw(graph, variant)
        except EngineError as error:
            return {"failed": str(error)[-200:]}
        except subprocess.CalledProcessError as error:
            said = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
            return {"failed": said[-1][:200]}
        size = sum(file.stat().st_size for file in _files_of(graph))
        return {**made, **_figures(self._reference.measure(pixels)), "bytes": size}

    def _score_torch(self, variant: Variant) -> dict[str, Any]:
        """Pictures' figures of a module that simulates; it has no graph."""
        feeds = [item.feeds for item in self._items.items]
        module, used = quantized(Source.open(REFERENCE / self.model), self.denoiser, feeds, variant.maker)
        pixels = self._draw_with(TorchSession(module, self.denoiser), variant)
        return {"version": used, **_figures(self._reference.measure(pixels))}

    def times(self, variants: Sequence[Variant], runs: int) -> dict[tuple[str, str], dict[str, Any]]:
        """One guided step of one picture, by the variants' keys; ratios are to the float32 of ``FLOAT``."""
        use_library(self._python)
        tried = [(variant, engine) for variant in variants for engine in _engines(variant)]
        with Progress() as progress:
            bindings = {}
            for at, (variant, engine) in enumerate(tried):
                progress(f"loading {variant.tool}", at / len(tried))
                with suppress(EngineError):  # with these options; one of the others was drawn with
                    bindings[at] = self._bound(self.made(variant)[0], engine)
            progress(f"timing {len(bindings)} graphs", 0.0)
            times = _time_in_turn(bindings, runs, 5)
        base = min(np.median(times[at]) for at in times if tried[at][0].key == FLOAT)
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for at, milliseconds in times.items():
            (variant, engine), (p10, median, p90) = tried[at], np.percentile(milliseconds, (10, 50, 90))
            step = {"ms": median, "ratio": median / base, "p10": p10 / base, "p90": p90 / base, "options": engine}
            if median < found.get(variant.key, {"ms": np.inf})["ms"]:
                found[variant.key] = step
        return found

    def made(self, variant: Variant) -> tuple[Path, dict[str, Any]]:
        """The file of the variant's graph, made where it is not there, and facts about its making.

        Raises:
            CalledProcessError: the tool cannot do it; its stderr says why.
        """
        if not variant.maker:
            return self._float, {}
        folder = self.work / variant.maker
        if "@" in variant.maker:
            if not folder.exists():
                self._ours(variant.maker, folder)
            return folder / self.denoiser.model, {}
        if not folder.exists():
            with new_folder(folder) as made:
                (made / "made.json").write_text(self._theirs(variant, made / _file(variant)))
        return folder / _file(variant), json.loads((folder / "made.json").read_text())

    @property
    def _float(self) -> Path:
        folder = self.work / "float32"
        if not folder.exists():
            with new_folder(folder) as made:
                plain_graph(self.bundle.path / self.denoiser.model, made / "model.onnx")
        return folder / "model.onnx"

    def _export(self, folder: Path, progress: Progress) -> Bundle:
        # Copied weights: other tools refuse external data that is a file with several links.
        return export(REFERENCE / self.model, folder, weights="copy", progress=progress)

    @cached_property
    def _items(self) -> Drawn:
        drawing = Drawing("uniform", SAMPLES, STEPS, guidance_scale=GUIDANCE)
        with Progress() as progress:
            return draw_items(self.bundle, self.judge.prompts, drawing, keep=self.work / "items", progress=progress)

    def _ours(self, maker: str, folder: Path) -> None:
        (recipe, *more), placement = maker.split("@")[0].split("+"), load_placement(maker.split("@")[1])
        state, source = self.work / f"state-{recipe}", REFERENCE / self.model
        with tempfile.TemporaryDirectory(dir=self.work) as temporary, Progress() as progress:
            if not state.exists():
                mixed = {"int8-float": replace(load_recipe("int8"), effective_bits=MIXED_BITS[self.model])}
                known = {**RECIPES, **mixed}.get(recipe) or load_recipe(recipe)
                state_of(self.bundle, Source.open(source), self._items, known, progress=progress).save(state)
            report = Path(temporary) / "sensitivity.json" if "sensitivity" in more else None
            if report:
                sensitivity(self.bundle, state, report, source=source, progress=progress)
            output = Path(temporary) / "unfolded" if "fold" in more else folder
            bundle = quantize(self.bundle, state, output, placement=placement, sensitivity=report, progress=progress)
            if "fold" in more:
                fold(bundle, folder, steps=STEPS, progress=progress)

    def _theirs(self, variant: Variant, output: Path) -> str:
        items, plain = self._items.items, self._float
        with tempfile.TemporaryDirectory() as folder, Progress() as progress:
            progress(f"{variant.tool}", 0.0)
            np.savez(Path(folder) / "items.npz", **{name: np.stack([item.feeds[name] for item in items]) for name in items[0].feeds})
            command = [self._python, _peers.__file__, variant.maker, plain, Path(folder) / "items.npz", output]
            done = subprocess.run(command, check=True, cwd=folder, capture_output=True, text=True)
        return done.stdout.strip().splitlines()[-1]

    def _draw(self, graph: Path, variant: Variant) -> np.ndarray:
        return self._draw_with(self._first_that_loads(graph, variant), variant)

    def _draw_with(self, session: Any, variant: Variant) -> np.ndarray:
        sessions = {**self._others, self.denoiser.name: session}
        pipeline, parts = Pipeline(self.bundle, sessions), []
        with Progress() as progress:
            for at in range(0, self.pictures, BATCH):
                progress(f"drawing: {variant.tool}, {variant.engine}", at / self.pictures)
                part, seeds = self.prompts[at : at + BATCH], range(10_000 + at, 10_000 + at + BATCH)
                parts.append(pipeline(part, num_inference_steps=STEPS, guidance_scale=GUIDANCE, seed=seeds[: len(part)]).pixels)
        return np.concatenate(parts)

    def _first_that_loads(self, graph: Path, variant: Variant) -> Any:
        *tried, last = _engines(variant)
        for engine in tried:
            with suppress(EngineError):
                return open_foreign(graph, self.denoiser, engine)
        return open_foreign(graph, self.denoiser, last)

    def _bound(self, graph: Path, engine: str) -> Binding:
        item = self._items.items[SAMPLES // 2]
        sample = item.feeds["sample"]
        axes = {"batch": len(sample), "height": sample.shape[2], "width": sample.shape[3]}
        binding = open_foreign(graph, self.denoiser, engine).bind(axes)
        for name, array in item.feeds.items():
            binding.inputs[name][...] = array
        return binding


def _engines(variant: Variant) -> Sequence[str]:
    """Ours runs as it ships. Others' graphs, and float32, are tried with all options of their engine."""
    return [name for name in ENGINES if name.startswith(variant.engine) and ("@" not in variant.maker or name == variant.engine)]


def _file(variant: Variant) -> str:
    return "model.xml" if variant.engine.startswith("openvino") else "model.onnx"


def _files_of(graph: Path) -> list[Path]:
    """The graph and its weights."""
    return [file for file in graph.parent.iterdir() if file.suffix in (".onnx", ".xml", ".bin", ".safetensors")]


if __name__ == "__main__":
    main()
