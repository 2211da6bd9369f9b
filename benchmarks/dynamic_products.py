"""What finding ranges at run time costs in ONNX Runtime: python benchmarks/dynamic_products.py

Times single matrix products, of the sizes that the shipped networks and Stable Diffusion 1.5 have, and whole steps of the shipped
denoisers (guidance batch of two), all as the package writes them (optimize/passes/_dynamic.py): float, int8 with constant ranges, with one
range for a tensor at run time, with one for each token, and for each token and group of its channels. Convolutions are int8 with constant
ranges in all but the float graph. All forms of a row take turns in one process; ratios are to float.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from _report import REFERENCE, save

from edgediffusion import text
from edgediffusion.bundle import Bundle, Component
from edgediffusion.export import export
from edgediffusion.optimize.calibrate import state_of
from edgediffusion.optimize.finite import bind, noise_feeds
from edgediffusion.optimize.graph_file import store_weights
from edgediffusion.optimize.items import Drawing, draw_items
from edgediffusion.optimize.passes.insert_qdq import insert_qdq
from edgediffusion.optimize.quantize import quantize
from edgediffusion.optimize.recipe import Recipe, load_placement, load_recipe
from edgediffusion.optimize.sensitivity_times import time_in_turn
from edgediffusion.optimize.state import LayerState
from edgediffusion.registry import find
from edgediffusion.runtimes.engines import Binding

SIZES = ((128, 128, 128), (128, 512, 128), (2048, 320, 320), (2048, 320, 2560), (512, 640, 5120), (128, 1280, 1280))  # rows, in, out
FORMS: dict[str, dict[str, Any]] = {
    "constant": {},
    "tensor": {"dynamic": "tensor"},
    "token": {"dynamic": "token"},
    "token, 128": {"dynamic": "token", "group": 128},
    "token, 64": {"dynamic": "token", "group": 64},
    "token, 32": {"dynamic": "token", "group": 32},
}
RECIPE = replace(load_recipe("int8"), balance="none")
PROMPTS = ["a photo of a dress", "a dark coat", "a sneaker", "a bright bag"]
HEAD = ["what", "float ms", *FORMS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=60)
    runs = parser.parse_args().runs
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES:
            rows.append(_row("{} x {} -> {}".format(*size), _products(size, Path(folder)), runs))
        for model in ("fashion", "fashion-dit"):
            rows.append(_row(f"a step of {model}", _steps(model, Path(folder)), runs))
    print(text.markdown_table(HEAD, [[row["what"], f"{row['float_ms']:.3f}", *(f"{row[form]:.2f}" for form in FORMS)] for row in rows]))
    save("dynamic_products", {"runs": runs, "rows": rows})


def _row(what: str, bindings: Sequence[Binding], runs: int) -> dict[str, Any]:
    """``bindings``: float, then a form each."""
    times = np.median(time_in_turn(bindings, runs), 1)
    return {"what": what, "float_ms": float(times[0]), **{form: float(times[at] / times[0]) for at, form in enumerate(FORMS, 1)}}


def _products(size: tuple[int, int, int], folder: Path) -> list[Binding]:
    rows, read, out = size
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((out, read)).astype(np.float32), rng.standard_normal((1, rows, read)).astype(np.float32)
    proto = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 23]>
        network (float[1, {rows}, {read}] x) => (float[1, {rows}, {out}] y)
        {{ turned = Transpose <perm = [1, 0]> (w) y = MatMul (x, turned) }}
        """)
    proto.graph.node[0].input[0] = "linear.weight"
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "linear.weight"))
    component = Component(name="product", role="denoise", model="model.onnx", inputs=(), outputs=())
    found = []
    for at, changes in enumerate([None, *FORMS.values()]):
        model = ir.from_proto(proto)
        if changes is not None:
            recipe: Recipe = replace(RECIPE, exclude=(), **changes)
            ends = (x[0].min(0), x[0].max(0), np.full(out, -99, np.float32), np.full(out, 99, np.float32))
            amax = np.abs(weight).reshape(out, recipe.groups(weight.shape), -1).max(2)
            state = LayerState(np.ones(read, np.float32), *ends, amax if amax.shape[1] > 1 else amax[:, 0])
            insert_qdq(model, {"linear": state}, recipe, load_placement("onnxruntime-cpu"))
        place = folder / f"{rows}-{read}-{out}-{at}"
        place.mkdir()
        store_weights(model, place)
        ir.save(model, place / "model.onnx")
        found.append(_bound(component, place / "model.onnx", {"x": x}))
    return found


def _bound(component: Component, file: Path, feeds: dict[str, np.ndarray]) -> Binding:
    engine = find("runtimes.engines", "onnxruntime")
    session = engine.open_session(file)
    given: Binding = bind(engine, replace(component, inputs=session.inputs, outputs=session.outputs), file, feeds)
    return given


def _steps(model: str, folder: Path) -> list[Binding]:
    bundle = export(REFERENCE / model, folder / model)
    drawn = draw_items(bundle, PROMPTS, Drawing(samples=8, steps=8))
    bundles = [bundle]
    for at, changes in enumerate(FORMS.values()):
        state = state_of(bundle, None, drawn, replace(RECIPE, **changes), folder=folder)
        bundles.append(quantize(bundle, state, folder / f"{model}-{at}"))
    return [_step(part) for part in bundles]


def _step(bundle: Bundle) -> Binding:
    (component,) = bundle.with_role("denoise")
    feeds = noise_feeds(bundle, component)
    assert feeds is not None
    assert bundle.sampling is not None
    side = bundle.sampling.height // bundle.sampling.downsampling
    feeds["sample"] = np.random.default_rng(0).standard_normal((2, feeds["sample"].shape[1], side, side)).astype(np.float32)
    return _bound(component, bundle.path / component.model, feeds)


if __name__ == "__main__":
    main()
