"""Pictures within a bound of memory, at Stable Diffusion 1.5's size: python benchmarks/max_memory.py [--folder F] [--steps N]

A pipeline of that size with random weights: the UNet of ``benchmarks/sd15.py``, CLIP's text encoder and the decoder in their full size,
float32, 4.1 GB of weights. Each row is a process of its own that draws one picture of 512 x 512 with ``max_memory`` (the first without)
and reads its high-water mark: bound, peak, seconds to load and draw, what was traded, and how far the picture is from the first row's. A
bound that cannot be kept is a row too, with what it says it would take. ``parts`` has the graphs alone, each with an arena and without:
what is there once it is loaded, and at the peak of a run, beside the estimate.

``make`` (torch, some minutes) is done once for a --folder. Seconds are worth something on a quiet machine only; bytes are not disturbed.
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
from pathlib import Path
from typing import Any

import numpy as np
from _report import save

from edgediffusion.text import table

BOUNDS = ("", "12GB", "7GB", "6GB", "5GB", "4GB")
PARTS = {"text_encoder": 1, "unet": 2, "vae_decoder": 1}  # rows of a call
TILED = 32  # latents of a tile, for the decoder's other row
PROMPT = "a photo of a dress"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the pipeline is kept; a temporary folder by default")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--bounds", default=",".join(BOUNDS), help="an empty one is without a bound")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(_one(given.one, given.folder, given.steps)))
        return
    with tempfile.TemporaryDirectory(prefix="max-memory-") as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "float").exists():
            _process("make", folder, given.steps)
        rows = [_process(f"draw {bound}", folder, given.steps) for bound in given.bounds.split(",")]
        parts = [_process(f"part {name} {way}", folder, given.steps) for name in (*PARTS, "tile") for way in ("arena", "lean")]
    save("max_memory", {"steps": given.steps, "load_average": round(os.getloadavg()[0], 1), "rows": rows, "parts": parts})
    print(_table(rows), _parts_table(parts), sep="\n\n")


def _process(task: str, folder: Path, steps: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", task, "--folder", str(folder), "--steps", str(steps)]
    result: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
    print(task, result, file=sys.stderr, flush=True)
    return result


def _one(task: str, folder: Path, steps: int) -> dict[str, Any]:
    what, _, rest = task.partition(" ")
    if what == "make":
        return make(folder)
    return draw(folder, rest, steps) if what == "draw" else part(folder, *rest.split())


def make(folder: Path) -> dict[str, Any]:
    import sd15
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    from edgediffusion.export import export

    sd15.make(folder)
    source = folder / "source"
    words = json.loads((source / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    for name in ("text_encoder", "vae"):
        shutil.rmtree(source / name)
    torch.manual_seed(0)
    keys = {key: words[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 49408}
    CLIPTextModel(CLIPTextConfig(**sizes, **keys)).save_pretrained(source / "text_encoder")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    AutoencoderKL(
        **blocks, block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512
    ).save_pretrained(source / "vae")
    export(source, folder / "float")
    return {}


def draw(folder: Path, bound: str, steps: int) -> dict[str, Any]:
    """One picture, the way ``edgediffusion run`` draws it. Hashes are not compared: that would count for the first row alone."""
    from edgediffusion.bundle import Bundle
    from edgediffusion.errors import ArgumentError
    from edgediffusion.runtimes import Pipeline
    from edgediffusion.runtimes.memory import peak_bytes

    bundle = Bundle.open(folder / "float", verify=False)
    started = time.perf_counter()
    try:
        pipeline = Pipeline.from_bundle(bundle, max_memory=bound or None)
        result = pipeline(PROMPT, num_inference_steps=steps, guidance_scale=5.0, seed=0)
    except ArgumentError as error:
        return {"bound": bound, "refused": str(error)}
    seconds = time.perf_counter() - started
    first = folder / "first.npy"
    if not bound:
        np.save(first, result.pixels)
    off = float(np.abs(result.pixels - np.load(first)).max() * 255) if first.exists() else None
    return {
        "bound": bound,
        "peak_mb": round(peak_bytes() / 1e6),
        "seconds": round(seconds, 1),
        "step_s": round(float(np.median(result.timings.step_ms)) / 1e3, 1),
        "largest_difference": off,  # of any pixel, in 1/255; 0 is equal to the bit
        "said": list(result.warnings),
    }


def part(folder: Path, name: str, way: str) -> dict[str, Any]:
    """A graph alone, beside what ``runtimes/memory.py`` expects of it."""
    from edgediffusion.bundle import Bundle
    from edgediffusion.runtimes import memory
    from edgediffusion.runtimes.graph import open_components

    tile, name = name == "tile", "vae_decoder" if name == "tile" else name
    bundle = Bundle.open(folder / "float", verify=False)
    side = TILED if tile else 64
    axes = {"batch": PARTS[name], "height": side, "width": side, "image_height": 8 * side, "image_width": 8 * side}
    component = bundle.component(name)
    need = memory.need_of(bundle.path / component.model, tuple(sorted(axes.items())))
    (graph,) = open_components(bundle, [component], target=None, threads=None, lean=way == "lean")
    before, loaded = memory.peak_bytes(), memory.resident_bytes()
    binding = graph.session.bind(axes)
    binding.run()
    expected = need.weights + (need.activations if way == "lean" else need.arena)
    return {
        "part": name if name == "text_encoder" else f"{name}, {8 * side} pixels",
        "way": way,
        "loaded_mb": round(loaded / 1e6),
        "loading_peak_mb": round(before / 1e6),
        "peak_mb": round(memory.peak_bytes() / 1e6),
        "expected_mb": round(expected / 1e6),  # on top of the interpreter's and libraries' own
    }


def _table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        told = row.get("refused") or " ".join(row["said"]) or "nothing"
        numbers = ["-"] * 3 if "refused" in row else [row["peak_mb"], row["seconds"], f"{row['largest_difference']:.2g}"]
        lines.append((row["bound"] or "none", *numbers, told))
    return table(("bound", "peak MB", "seconds", "difference / 255", "traded"), lines)


def _parts_table(parts: list[dict[str, Any]]) -> str:
    return table(tuple(parts[0]), [tuple(row.values()) for row in parts])


if __name__ == "__main__":
    main()
