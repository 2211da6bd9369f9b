"""Graphs of published networks, traced without weights, and what a call of each takes: python benchmarks/_fit_graphs.py FOLDER [NAMES]

Writes benchmarks/fit_networks.json, which benchmarks/fit.py holds published times against. The estimate is a sum over nodes, so sums are
enough: operations of products, in floats and where they are quantized in codes, bytes that kernels move, how many there are, and the
bytes of weights and activations.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from _shapes import SHAPES, Shape, make, transformer_sd35_medium

DATA = Path(__file__).with_name("fit_networks.json")
# Name: the pipeline of _shapes.py, its network, the graph of that, and the sizes that it is counted at.
NETWORKS: dict[str, tuple[str, str, str, dict[str, int]]] = {
    "sd15 unet, 512, 2 rows": ("sd15", "unet", "unet", {"batch": 2, "height": 64, "width": 64}),
    "sd15 vae, 512": ("sd15", "vae", "vae_decoder", {"batch": 1, "height": 64, "width": 64}),
    "sdxl unet, 1024, 2 rows": ("sdxl", "unet", "unet", {"batch": 2, "height": 128, "width": 128}),
    "sdxl unet, 1024, 1 row": ("sdxl", "unet", "unet", {"batch": 1, "height": 128, "width": 128}),
    "sdxl unet, 512, 1 row": ("sdxl", "unet", "unet", {"batch": 1, "height": 64, "width": 64}),
    "sd15 unet, 512, 8 rows": ("sd15", "unet", "unet", {"batch": 8, "height": 64, "width": 64}),
    "sd15 unet, 512, 16 rows": ("sd15", "unet", "unet", {"batch": 16, "height": 64, "width": 64}),
    "sdxl vae, 1024": ("sd15", "vae", "vae_decoder", {"batch": 1, "height": 128, "width": 128}),
    "sd3 transformer, 1024, 2 rows": ("sd3", "transformer", "transformer", {"batch": 2, "height": 128, "width": 128, "tokens": 333}),
    "flux transformer, 1024, 1 row": ("flux-dev", "transformer", "transformer", {"batch": 1, "height": 128, "width": 128, "tokens": 512}),
}
# Stable Diffusion XL's decoder overflows in float16, so published rows run it in float32, the other one in float16.
FORMATS = {"vae": ("float16", "float32")}


def main() -> None:
    if sys.argv[1] == "--trace":
        trace(sys.argv[2], sys.argv[3], Path(sys.argv[4]))
        return
    folder, chosen = Path(sys.argv[1]), sys.argv[2:] or list(NETWORKS)
    found: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8")) if DATA.is_file() else {}
    for name in chosen:
        shape, network, graph, sizes = NETWORKS[name]
        at = folder / shape / network
        if not at.exists():
            subprocess.run([sys.executable, __file__, "--trace", shape, network, str(at)], check=True)
        found[name] = counted(at / graph / "model.onnx", sizes, FORMATS.get(network, ("float16", "int8")))
        print(name, found[name], flush=True)
        DATA.write_text(json.dumps({name: found[name] for name in sorted(found)}, indent=1) + "\n", encoding="utf-8")


def _sd3() -> Shape:
    """Stable Diffusion 3 medium is 3.5 without its second attention and without norms of keys and queries."""
    shape = SHAPES["sd35-medium"]()
    config = {**transformer_sd35_medium(), "dual_attention_layers": [], "qk_norm": None, "pos_embed_max_size": 192}
    return replace(shape, components={**shape.components, "transformer": ("diffusers", "SD3Transformer2DModel", config)})


def trace(shape: str, network: str, folder: Path) -> None:
    """Every graph of one network, without weights: ``folder/<graph>/model.onnx``."""
    import tempfile

    import onnx_ir as ir
    import torch

    from edgediffusion.export.families import family_of
    from edgediffusion.export.pipeline import _graph
    from edgediffusion.export.skeleton import skeleton
    from edgediffusion.export.source import Source

    with tempfile.TemporaryDirectory() as temporary:
        SHAPES["sd3"] = _sd3
        make(shape, Path(temporary) / "source", ())
        source = Source.open(Path(temporary) / "source")
        for part in (p for p in family_of(source)[1].parts(source) if p.network == network):
            model = _graph(part, skeleton(lambda part=part: source.network(part.network), torch.float32), 23, ())
            for name, value in model.graph.initializers.items():
                if value.const_value is None:
                    value.const_value = ir.ExternalTensor("none", 0, 0, value.dtype, shape=value.shape, name=name)
            (folder / part.name).mkdir(parents=True)
            ir.save(model, folder / part.name / "model.onnx")


def counted(file: Path, sizes: dict[str, int], formats: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """By format, for an engine of a GPU: what it fuses moves nothing, and its attention never writes scores."""
    from edgediffusion.profiles.fit_work import narrowed, pieces
    from edgediffusion.runtimes.work import graph_work

    work = graph_work(file, sizes, scores=False)
    found = {}
    for format in formats:
        half = work if format == "float32" else narrowed(work, "float16")
        half = narrowed(half, "int8") if format == "int8" else half
        kernels = pieces(half, "tensorrt")
        found[format] = {
            "operations": sum(piece.operations for piece in kernels if piece.format != "int8"),
            "operations_in_codes": sum(piece.operations for piece in kernels if piece.format == "int8"),
            "bytes": sum(piece.weight_bytes + piece.moved_bytes for piece in kernels),
            "kernels": len(kernels),
            "resident_bytes": half.weight_bytes + half.peak_bytes,
        }
    return found


if __name__ == "__main__":
    main()
