"""A UNet of Stable Diffusion 1.5's shape, float32 beside int8 on this processor: python benchmarks/sd15.py [--parts PARTS]

No weights of that size ship with the package, so they are drawn: 860 million parameters of diffusers' own initialization, with a
text encoder of the right width and a decoder of the right factor, both small. Times and memory depend on shapes alone; what int8
does to pictures is measured on trained pipelines (benchmarks/quantization.py). Parts, in this order, each in a process of its own:

    make        the pipeline in diffusers' format (3.4 GB)
    export      the float32 bundle; seconds, peak memory
    calibrate   a state from two items at 64 x 64 latents
    pass        the graph with Q/DQ nodes and int8 weights, for each placement; seconds, peak memory
    quantize    the whole verb for the default target: that pass, hashes, and one call of what came out; seconds, peak memory
    step        one step: two rows, 64 x 64 latents, 77 tokens. torch, ONNX Runtime and OpenVINO in turn, so that what
                disturbs one disturbs all

Two more are done where ``--parts cut,cache`` asks for them, after ``make``:

    cut         a float32 bundle that can be cached, cut where DeepCache's own pipeline cuts it; seconds, peak memory
    cache       the loop of a picture, 10 steps of two rows at 64 x 64 latents, without a cache and with DeepCache, N = 5, in turn

What a part made is kept in --folder and found there by the next; OpenVINO's rows want ``pip install openvino``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from _report import REFERENCE, RESULTS, save

from edgediffusion import text
from edgediffusion.registry import names

PARTS = ("make", "export", "calibrate", "pass", "quantize", "step")
CACHING = ("cut", "cache")
CUT, POLICY, STEPS = "up_blocks.3.resnets.1", "deepcache:interval=5", 10
UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
SHAPES = {"sample": (2, 4, 64, 64), "timestep": (1,), "encoder_hidden_states": (2, 77, 768)}
PROMPTS = ["a photo of a dress", "a dark coat"]
_FLOAT_BYTES = 12_000_000_000  # that a compiled float32 graph and the compiling of it take; left out where there is less
PLACEMENTS = names("optimize.placements", ".toml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="what to do, of: " + ",".join((*PARTS, *CACHING)))
    parser.add_argument("--folder", type=Path, help="where what the parts make is kept; a temporary folder by default")
    parser.add_argument("--runs", type=int, default=5, help="how often each engine makes the step")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(_measured(given.one, given.folder, given.runs)))
        return
    with tempfile.TemporaryDirectory(prefix="sd15-") as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        file = RESULTS / "sd15.json"
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        found.pop("made_by", None)
        for part in given.parts.split(","):
            for name in _processes(part):
                found[name] = _in_process(name, folder, given.runs)
                print(name, {key: value for key, value in found[name].items() if key != "rows"}, flush=True)
                save("sd15", found)
    if "rows" in found.get("step", {}):
        print(_table(found["step"]["rows"]))


def _processes(part: str) -> tuple[str, ...]:
    return tuple(f"pass {placement}" for placement in PLACEMENTS) if part == "pass" else (part,)


def _in_process(name: str, folder: Path, runs: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", name, "--folder", str(folder), "--runs", str(runs)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def _measured(name: str, folder: Path, runs: int) -> dict[str, Any]:
    """Run one part here. ``peak_mb`` is the largest resident set of this process: mapped files count as far as they were touched."""
    part, _, argument = name.partition(" ")
    started = time.perf_counter()
    if part == "step":
        found = step(folder, runs)
    elif part == "cache":
        found = cache(folder, runs)
    elif part == "pass":
        found = insert(folder, argument)
    else:
        found = {"make": make, "export": export, "calibrate": calibrate, "quantize": quantize, "cut": cut}[part](folder)
    return {"seconds": round(time.perf_counter() - started, 1), "peak_mb": round(_peak_bytes() / 1e6), **found}


def _peak_bytes() -> int:
    """VmHWM of /proc/self/status: that of this process's own program, where getrusage counts its parent's before exec too."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def make(folder: Path) -> dict[str, Any]:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    source = folder / "source"
    shutil.rmtree(source, ignore_errors=True)
    fashion = REFERENCE / "fashion"
    for name in ("scheduler", "tokenizer"):
        shutil.copytree(fashion / name, source / name)
    for name in ("model_index.json", "prompts.txt"):
        shutil.copyfile(fashion / name, source / name)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**UNET)
    parameters = sum(p.numel() for p in unet.parameters())
    unet.save_pretrained(source / "unet")
    words = json.loads((fashion / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    width = UNET["cross_attention_dim"]
    keys = {key: words[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPTextConfig(hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=8, **keys)
    CLIPTextModel(config).save_pretrained(source / "text_encoder")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    AutoencoderKL(**blocks, block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=4).save_pretrained(source / "vae")
    return {"parameters": parameters}


def export(folder: Path) -> dict[str, Any]:
    from edgediffusion.export import export

    shutil.rmtree(folder / "float", ignore_errors=True)
    export(folder / "source", folder / "float")
    return {}


def cut(folder: Path) -> dict[str, Any]:
    from edgediffusion.export import export

    shutil.rmtree(folder / "cut", ignore_errors=True)
    export(folder / "source", folder / "cut", cuts=(CUT,))
    return {"cut": CUT}


def cache(folder: Path, runs: int) -> dict[str, Any]:
    """Medians of the loops, and the ratio of the medians: no decoding, which a cache does not touch."""
    from edgediffusion.bundle import Bundle
    from edgediffusion.runtimes import Pipeline

    pipeline = Pipeline.from_bundle(Bundle.open(folder / "cut", verify=False))
    loops: dict[str, list[float]] = {"none": [], POLICY: []}
    whole: dict[str, int] = {}
    for run in range(1 + runs):
        for policy, times in loops.items():
            seen: dict[int, Any] = {}
            options: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "seed": run, "cache": policy}
            steps = pipeline.steps(PROMPTS[0], observe=seen.__setitem__, **options)
            if run == 0:  # sets up the buffers of both graphs
                next(steps), next(steps)
                continue
            times += [step.elapsed_ms / 1e3 for step in steps]
            whole[policy] = len(seen)
    sums = {policy: np.array(times).reshape(runs, STEPS).sum(1) for policy, times in loops.items()}
    rows = [
        {"policy": p, "whole_calls": whole[p], "median_s": round(float(np.median(t)), 2), "min_s": round(float(t.min()), 2)}
        for p, t in sums.items()
    ]
    ratio = float(np.median(sums["none"] / sums[POLICY]))
    return {"runs": runs, "steps": STEPS, "faster": round(ratio, 2), "load_average": round(os.getloadavg()[0], 1), "rows": rows}


def calibrate(folder: Path) -> dict[str, Any]:
    from edgediffusion.bundle import Bundle
    from edgediffusion.optimize import calibrate

    shutil.rmtree(folder / "state", ignore_errors=True)
    bundle = Bundle.open(folder / "float", verify=False)
    state = calibrate(bundle, source=folder / "source", output=folder / "state", samples=2, steps=2, prompts=PROMPTS)
    return {"items": 2, "layers": len(state.layers)}


def insert(folder: Path, placement: str) -> dict[str, Any]:
    import onnx_ir as ir

    from edgediffusion.optimize import QuantizationState
    from edgediffusion.optimize.graph_file import WEIGHTS, load_graph, store_weights
    from edgediffusion.optimize.passes.insert_qdq import insert_qdq
    from edgediffusion.optimize.recipe import load_placement, load_recipe

    output = folder / f"int8-{placement}"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    states = QuantizationState.load(folder / "state").layers
    model = load_graph(folder / "float" / "unet" / "model.onnx")
    report = insert_qdq(
        model, {name.removeprefix("unet/"): layer for name, layer in states.items()}, load_recipe("int8"), load_placement(placement)
    )
    store_weights(model, output)
    ir.save(model, output / "model.onnx")
    return {"layers": len(report.quantized), "weights_mb": round((output / WEIGHTS).stat().st_size / 1e6)}


def quantize(folder: Path) -> dict[str, Any]:
    from edgediffusion.bundle import Bundle
    from edgediffusion.optimize import quantize

    shutil.rmtree(folder / "int8", ignore_errors=True)
    quantize(Bundle.open(folder / "float", verify=False), folder / "state", folder / "int8")
    return {}


def step(folder: Path, runs: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    feeds["timestep"][:] = 500
    steps = _engines(folder, feeds)
    outputs = {name: run() for name, run in steps.items()}  # the first call of each sets up buffers
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(runs):
        for name, run in steps.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    exact = outputs["torch float32"]
    rows = [
        {
            "engine": name,
            "median_s": round(float(np.median(t)), 3),
            "min_s": round(min(t), 3),
            "error": float(f"{np.linalg.norm(outputs[name] - exact) / np.linalg.norm(exact):.2g}"),
        }
        for name, t in times.items()
    ]
    # Beside other work the order of engines can be trusted, and little else.
    return {"runs": runs, "threads": len(os.sched_getaffinity(0)), "load_average": round(os.getloadavg()[0], 1), "rows": rows}


def _engines(folder: Path, feeds: Mapping[str, np.ndarray]) -> dict[str, Callable[[], np.ndarray]]:
    float32 = folder / "float" / "unet" / "model.onnx"
    found = {"torch float32": _torch(folder / "source", feeds), "ONNX Runtime float32": _onnxruntime(float32, feeds)}
    found["ONNX Runtime int8"] = _onnxruntime(folder / "int8-onnxruntime-cpu" / "model.onnx", feeds)
    try:
        import openvino  # noqa: F401
    except ImportError:
        return found
    int8 = folder / "int8-openvino" / "model.onnx"
    found["OpenVINO int8"] = _openvino(int8, feeds, "f32")
    found["OpenVINO int8, bfloat16 hint"] = _openvino(int8, feeds, "bf16")
    if _available_bytes() > _FLOAT_BYTES:
        found["OpenVINO float32"] = _openvino(float32, feeds, "f32")
    return found


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _torch(source: Path, feeds: Mapping[str, np.ndarray]) -> Callable[[], np.ndarray]:
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(source / "unet")
    given = {name: torch.from_numpy(array) for name, array in feeds.items()}

    def run() -> np.ndarray:
        with torch.no_grad():
            return np.asarray(unet(**given, return_dict=False)[0].numpy())

    return run


def _onnxruntime(model: Path, feeds: Mapping[str, np.ndarray]) -> Callable[[], np.ndarray]:
    """As our engine runs it: its options, its fusions."""
    from edgediffusion.runtimes.engines import onnxruntime

    binding = onnxruntime.open_session(model).bind({"batch": 2, "height": 64, "width": 64})
    for name, array in feeds.items():
        binding.inputs[name][...] = array

    def run() -> np.ndarray:
        binding.run()
        return next(iter(binding.outputs.values()))

    return run


def _openvino(model: Path, feeds: Mapping[str, np.ndarray], precision: str) -> Callable[[], np.ndarray]:
    import openvino

    core = openvino.Core()
    read = core.read_model(model)
    read.reshape({name: list(array.shape) for name, array in feeds.items()})
    request = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}).create_infer_request()

    def run() -> np.ndarray:
        return np.asarray(next(iter(request.infer(dict(feeds)).values())))

    return run


def _table(rows: list[dict[str, Any]]) -> str:
    base = {row["engine"]: row["median_s"] for row in rows}
    head = ["engine", "median s", "min s", "of torch float32", "of ONNX Runtime float32", "error"]
    lines = []
    for row in rows:
        ratios = [f"{row['median_s'] / base[name]:.2f}" for name in ("torch float32", "ONNX Runtime float32")]
        lines.append([row["engine"], f"{row['median_s']:.2f}", f"{row['min_s']:.2f}", *ratios, f"{row['error']:.2g}"])
    return text.table(head, lines)


if __name__ == "__main__":
    main()
