"""What each cut of the shipped pipelines leaves to compute: python benchmarks/cuts.py

Every denoiser is exported with every cut that it has. Multiplications are those of convolutions, matrix products and attention in one
call at the batch of one picture with guidance, as a part of the whole graph's; the feature is what a cache keeps meanwhile, at the
same batch. Nothing here is a time: these figures are the same on every machine. benchmarks/caching.py has times.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from _report import REFERENCE, save

from edgediffusion import text
from edgediffusion.bundle import Bundle, Component, axis_size
from edgediffusion.export import export
from edgediffusion.export.families import family_of
from edgediffusion.export.skeleton import skeleton
from edgediffusion.export.source import Source
from edgediffusion.profiles.latency import axes_of
from edgediffusion.registry import find

NAMES = ("fashion", "fashion-dit")
HEAD = ("pipeline", "cut", "head", "tail", "shallow", "kept between steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            bundle = export(REFERENCE / name, Path(folder) / name, cuts=places(Source.open(REFERENCE / name)))
            (whole,) = bundle.with_role("denoise")
            every = multiplications(bundle, whole)
            rows += [{"pipeline": name, "whole": every, **of_cut(bundle, cut)} for cut in bundle.cuts]
    print(text.markdown_table(HEAD, [shown(row) for row in rows]))
    save("cuts", {"rows": rows})


def places(source: Source) -> tuple[str, ...]:
    """Every cut of a pipeline's denoiser."""
    (part,) = (part for part in family_of(source)[1].parts(source) if part.cuts is not None)
    assert part.cuts is not None
    import torch

    return part.cuts.places(skeleton(partial(source.network, part.network), torch.float32).network)


def of_cut(bundle: Bundle, cut: str) -> dict[str, Any]:
    parts = bundle.with_cut(cut)
    shallow = parts["denoise.shallow"]
    axes = axes_of(bundle, shallow, 1)
    (kept,) = (spec for spec in shallow.inputs if spec.name in (cut, f"{cut}.residual"))
    size = int(np.prod([axis if isinstance(axis, int) else axis_size(axis, axes) for axis in kept.shape]))
    counted = {role.rsplit(".", 1)[-1]: multiplications(bundle, part) for role, part in parts.items()}
    return {"cut": cut, **counted, "kept_bytes": size * np.dtype(kept.dtype).itemsize}


def shown(row: dict[str, Any]) -> list[str]:
    parts = [f"{row[part] / row['whole']:.1%}" if part in row else "" for part in ("head", "tail", "shallow")]
    return [row["pipeline"], f"`{row['cut']}`", *parts, text.size(row["kept_bytes"])]


def multiplications(bundle: Bundle, component: Component) -> int:
    """In one call: sizes are those that the engine finds, with every tensor that counts given as an output."""
    model = ir.load(bundle.path / component.model)
    counting = [node for node in model.graph if node.op_type in COUNTS]
    there = {value.name for value in (*model.graph.outputs, *model.graph.inputs)}
    values = {value.name: value for node in counting for value in (*node.inputs[:2], node.outputs[0]) if value is not None}
    model.graph.outputs.extend(v for name, v in values.items() if name not in there and not v.is_initializer())
    file = (bundle.path / component.model).with_name("counted.onnx")
    ir.save(model, file)
    session = find("runtimes.engines", "onnxruntime").open_session(file, threads=1)
    binding = session.bind(axes_of(bundle, component, 1))
    shapes = {name: array.shape for arrays in (binding.inputs, binding.outputs) for name, array in arrays.items()}
    shapes |= {name: tuple(map(int, v.shape)) for name, v in values.items() if v.is_initializer() and v.shape is not None}
    return sum(
        COUNTS[node.op_type](*(shapes[value.name] for value in (*node.inputs[:2], node.outputs[0]) if value is not None))
        for node in counting
    )


def of_convolution(x: tuple[int, ...], weight: tuple[int, ...], given: tuple[int, ...]) -> int:
    return int(np.prod(given) * np.prod(weight[1:]))


def of_product(x: tuple[int, ...], weight: tuple[int, ...], given: tuple[int, ...]) -> int:
    return int(np.prod(given) * x[-1])


def of_attention(query: tuple[int, ...], key: tuple[int, ...], given: tuple[int, ...]) -> int:
    """Of [batch, heads, tokens, width]: query times key, and the weights times as many values."""
    return int(np.prod(query) * key[2] + np.prod(given) * key[2])


COUNTS = {"Conv": of_convolution, "MatMul": of_product, "Gemm": of_product, "Attention": of_attention}


if __name__ == "__main__":
    main()
