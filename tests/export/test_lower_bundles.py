"""Lowered bundles compute what they computed: the shipped denoisers in float and int8, every component of the other pipelines.

Tolerance: 1e-5 of the largest number, some dozens of roundings of 2^-23 over some hundreds of nodes (found: 8e-7). In an int8 graph
a number that lies half way between two codes may come to be the other one: 1 / 127 of the largest number (found: 4e-3).
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner

import edgediffusion
from edgediffusion import bundle as bundles
from edgediffusion.bundle import Bundle, axis_size
from edgediffusion.cli import main
from edgediffusion.errors import ArgumentError, Cancelled, OutputError
from edgediffusion.export import export
from edgediffusion.export.families import family_of
from edgediffusion.export.lower import lower
from edgediffusion.export.source import Source
from edgediffusion.files import link_or_copy
from edgediffusion.optimize import QuantizationState, quantize
from edgediffusion.optimize.calibrate import state_of
from edgediffusion.optimize.collect import Item
from edgediffusion.optimize.graph_file import load_graph
from edgediffusion.optimize.graph_layers import find_layers
from edgediffusion.optimize.items import Drawn
from edgediffusion.optimize.recipe import load_recipe
from edgediffusion.optimize.state import LayerState, weights_digest
from edgediffusion.registry import find
from edgediffusion.runtimes.engines import resolve
from edgediffusion.runtimes.onnx_header import read_header
from edgediffusion.runtimes.sizes import parse_sizes

REFERENCE = Path(edgediffusion.__file__).parent / "reference"
LATENTS = {"batch": 2, "height": 8, "width": 12}
NEWER = {"Attention", "RMSNormalization", "RotaryEmbedding"}  # of opset 23


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lowered")


@pytest.fixture(scope="module", params=["fashion", "fashion-dit", "fashion-lcm"])
def shipped(request: pytest.FixtureRequest, folder: Path) -> Iterator[Bundle]:
    """The denoiser of a shipped pipeline."""
    family = family_of(Source.open(REFERENCE / request.param))[1]
    parts = family.parts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family, "parts", lambda given: tuple(part for part in parts(given) if part.role == "denoise"))
        yield export(REFERENCE / request.param, folder / request.param)


def sizes_of(bundle: Bundle) -> dict[str, int]:
    assert bundle.sampling is not None
    times = bundle.sampling.downsampling
    return {**LATENTS, "image_height": times * LATENTS["height"], "image_width": times * LATENTS["width"]}


def feeds_of(bundle: Bundle, name: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {}
    for spec in bundle.component(name).inputs:
        noise = rng.standard_normal(resolve(spec, sizes_of(bundle)))
        arrays[spec.name] = noise.astype(spec.dtype) if spec.dtype.startswith("float") else np.full(noise.shape, 3, spec.dtype)
        if spec.name == "timestep":
            arrays[spec.name][...] = 500
    return arrays


def run(bundle: Bundle, name: str) -> dict[str, np.ndarray]:
    session = find("runtimes.engines", "onnxruntime").open_session(bundle.path / bundle.component(name).model, threads=1)
    binding = session.bind(sizes_of(bundle))
    for key, array in feeds_of(bundle, name).items():
        binding.inputs[key][...] = array
    binding.run()
    return dict(binding.outputs)


def check(before: Bundle, after: Bundle, opset: int, tolerance: float = 1e-5) -> None:
    for component in before.components:
        wanted, got = run(before, component.name), run(after, component.name)
        assert wanted.keys() == got.keys()
        for name, array in wanted.items():
            assert np.abs(got[name].astype(np.float64) - array).max() <= tolerance * np.abs(array).max(), (component.name, name)
        model = onnx.load(after.path / component.model, load_external_data=False)
        assert not {node.op_type for node in model.graph.node} & NEWER
        header = read_header(after.path / component.model)
        assert header.opset == opset
        assert header.inputs == read_header(before.path / component.model).inputs


def int8(bundle: Bundle, output: Path, target: str) -> Bundle:
    """Of ranges of noise: any will do."""
    (whole,) = bundle.with_role("denoise")
    axes = {**LATENTS, "batch": 1}
    noise = np.random.default_rng(1)
    arrays = {s.name: noise.standard_normal([d if isinstance(d, int) else axis_size(d, axes) for d in s.shape]) for s in whole.inputs}
    fed = {**{k: a.astype(np.float32) for k, a in arrays.items()}, "timestep": np.full(arrays["timestep"].shape, 500, np.float32)}
    state = state_of(bundle, None, Drawn((Item(0, "", fed),), {"guidance_scale": 3.0, "seed": 0}), load_recipe("int8"))
    return quantize(bundle, state, output, target=target)


def test_the_shipped_denoisers_compute_the_same(shipped: Bundle, tmp_path: Path) -> None:
    for opset in (20, 17):
        made = lower(shipped, tmp_path / str(opset), opset=opset)
        check(shipped, made, opset)
        (report,) = made.history[-1].arguments["graphs"].values()
        assert report["rewritten"]["Attention"] >= 6
        assert ("Gelu" in report["rewritten"]) == (opset < 20)


@pytest.mark.parametrize("target", ["cpu-x86-64", "jetson-orin-nano"])
def test_an_int8_graph_computes_the_same_and_keeps_its_pairs(shipped: Bundle, tmp_path: Path, target: str) -> None:
    before = int8(shipped, tmp_path / "int8", target)
    after = lower(before, tmp_path / "lowered", opset=17)
    check(before, after, 17, 1 / 127)
    kinds = [
        Counter(node.op_type for node in onnx.load(b.path / c.model, load_external_data=False).graph.node)
        for b in (before, after)
        for c in b.components
    ]
    assert kinds[0]["QuantizeLinear"] > 20
    assert kinds[0]["QuantizeLinear"] == kinds[1]["QuantizeLinear"]
    assert kinds[0]["DequantizeLinear"] == kinds[1]["DequantizeLinear"]


CUTS = {"small": ("up_blocks.1.resnets.0",), "flow_t5": ()}


@pytest.mark.parametrize("source", CUTS)
def test_every_component_of_other_pipelines(source: str, exported: Callable[..., Bundle], request: Any, tmp_path: Path) -> None:
    before = exported(request.getfixturevalue(source), cuts=CUTS[source])
    assert len([c for c in before.components if c.cut]) == len(CUTS[source])
    check(before, lower(before, tmp_path / "lowered", opset=17), 17)


def test_a_float16_int8_graph_of_opset_17_reads_and_gives_the_same_codes(
    small: Path, exported: Callable[..., Bundle], tmp_path: Path
) -> None:
    half = exported(small, dtype="float16")
    before = int8_half(half, tmp_path / "int8")
    after = lower(before, tmp_path / "lowered", opset=17)
    wanted, got = run(before, "unet")["out_sample"], run(after, "unet")["out_sample"]
    # Float16 numbers are divided by scales in float32 instead of float16: some come to lie in the next code, of a network whose codes
    # are as coarse as random weights make them (found: 0.053).
    assert np.linalg.norm((got - wanted).astype(np.float64)) < 0.1 * np.linalg.norm(wanted.astype(np.float64))


def int8_half(bundle: Bundle, output: Path) -> Bundle:
    (component,) = bundle.with_role("denoise")
    layers = {}
    for layer in find_layers(load_graph(bundle.path / component.model).graph):
        weight = layer.weight.const_value.numpy()
        weight = weight.T if layer.turned else weight
        inputs, outputs = np.ones(weight.shape[1] * layer.groups, np.float32), np.ones(len(weight), np.float32)
        amax = np.abs(weight.astype(np.float32)).reshape(len(weight), -1).max(1)
        layers[f"{component.name}/{layer.name}"] = LayerState(inputs, -4 * inputs, 4 * inputs, -4 * outputs, 4 * outputs, amax)
    state = QuantizationState(weights_digest(bundle, component), {}, layers, asdict(load_recipe("int8")))
    return quantize(bundle, state, output, target="jetson-orin-nano")


class TestTheBundle:
    @pytest.fixture
    def bundle(self, small: Path, exported: Callable[..., Bundle]) -> Bundle:
        return exported(small, cuts=CUTS["small"])

    def test_weights_are_linked_and_the_history_says_what_was_done(self, bundle: Bundle, tmp_path: Path) -> None:
        made = lower(bundle, tmp_path / "lowered", target="jetson-orin-nano")
        for name in bundle.files:
            if not name.endswith(".onnx"):
                assert (made.path / name).samefile(bundle.path / name), name
        verb = made.history[-1]
        assert (verb.name, verb.arguments["opset"], verb.arguments["target"]) == ("lower", 20, "jetson-orin-nano")
        assert (
            verb.arguments["graphs"]["unet"]["rewritten"] == {"Attention": 8} or verb.arguments["graphs"]["unet"]["rewritten"]["Attention"]
        )
        assert Bundle.open(made.path).digest == made.digest

    def test_the_same_bundle_gives_the_same_bytes(self, bundle: Bundle, tmp_path: Path) -> None:
        first, second = (lower(bundle, tmp_path / name, opset=17) for name in ("first", "second"))
        assert first.digest == second.digest

    def test_a_target_that_reads_what_is_there_gets_it_as_it_is(self, bundle: Bundle, tmp_path: Path) -> None:
        made = lower(bundle, tmp_path / "lowered", target="h100")
        assert all(made.files[name] == file for name, file in bundle.files.items())

    @pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed")
    def test_the_parser_of_tensorrt_reads_it(self, bundle: Bundle, tmp_path: Path) -> None:
        made = lower(bundle, tmp_path / "lowered", opset=17)
        sizes = parse_sizes("batch=2,height=8,width=8")
        file = made.path / made.component("unet").model
        find("runtimes.engines", "tensorrt-rtx").build(file, tmp_path / "unet.rtx", compute_capabilities=("8.6",), shapes=sizes)
        assert (tmp_path / "unet.rtx").stat().st_size > 1000

    @pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")
    def test_openvino_reads_it(self, bundle: Bundle, tmp_path: Path) -> None:
        made = lower(bundle, tmp_path / "lowered", opset=17)
        session = find("runtimes.engines", "openvino").open_session(made.path / made.component("unet").model, threads=1)
        binding = session.bind(LATENTS)
        for key, array in feeds_of(made, "unet").items():
            binding.inputs[key][...] = array
        binding.run()
        wanted = run(bundle, "unet")["out_sample"]
        assert np.abs(binding.outputs["out_sample"] - wanted).max() < 1e-4 * np.abs(wanted).max()

    def test_four_bits_in_blocks_are_refused_and_nothing_is_left(self, bundle: Bundle, tmp_path: Path) -> None:
        broken = with_blocks(bundle, tmp_path / "blocks")
        with pytest.raises(ArgumentError, match=r"'unet' has what opset 20 has no words for. Got: DequantizeLinear .* opset 21. Quantize"):
            lower(broken, tmp_path / "lowered", opset=20)
        assert [p.name for p in tmp_path.iterdir()] == ["blocks"]

    def test_both_or_neither_of_target_and_opset(self, bundle: Bundle, tmp_path: Path) -> None:
        for given in ({}, {"target": "h100", "opset": 20}):
            with pytest.raises(ArgumentError, match="Give --target or --opset"):
                lower(bundle, tmp_path / "lowered", **given)  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match=r"Got: 16. Allowed: 17 to 23"):
            lower(bundle, tmp_path / "lowered", opset=16)

    def test_a_folder_that_is_there_stays_as_it_is(self, bundle: Bundle, tmp_path: Path) -> None:
        (tmp_path / "lowered").mkdir()
        with pytest.raises(OutputError, match="exists already"):
            lower(bundle, tmp_path / "lowered", opset=20)

    def test_what_progress_raises_leaves_nothing(self, bundle: Bundle, tmp_path: Path) -> None:
        def stop(label: str, part: float) -> None:
            if label == "lowering unet":
                raise Cancelled("Enough")

        with pytest.raises(Cancelled):
            lower(bundle, tmp_path / "lowered", opset=20, progress=stop)
        assert list(tmp_path.iterdir()) == []

    def test_the_command(self, bundle: Bundle, tmp_path: Path) -> None:
        output = tmp_path / "lowered"
        result = CliRunner().invoke(main, ["lower", str(bundle.path), "--target", "jetson-orin-nano", "-o", str(output)])
        assert result.exit_code == 0, result.output
        assert "Attention" in result.output
        result = CliRunner().invoke(main, ["lower", str(output), "--opset", "17", "-o", str(tmp_path / "again"), "--json"])
        told = json.loads(result.stdout)
        assert told["lowered"]["graphs"]["unet"]["opset_before"] == 20


def with_blocks(bundle: Bundle, folder: Path) -> Bundle:
    """The bundle with a weight of int4 in blocks in its UNet, which nothing reads."""
    for name in bundle.files:
        link_or_copy(bundle.path / name, folder / name)
    file = folder / bundle.component("unet").model
    model = ir.load(file)
    w, s = (
        ir.Value(name=n, const_value=t, type=ir.TensorType(t.dtype), shape=ir.Shape(t.shape))
        for n, t in (
            ("blocks", ir.tensor(np.zeros((4, 2), np.int8), dtype=ir.DataType.INT4)),
            ("steps", ir.tensor(np.ones((2, 2), np.float32))),
        )
    )
    for value in (w, s):
        model.graph.register_initializer(value)
    model.graph.append(ir.node("DequantizeLinear", [w, s], attributes={"axis": 0, "block_size": 2}))
    file.unlink()
    ir.save(model, file)
    bundles.write(folder, family="tiny", components=bundle.components, sampling=bundle.sampling, history=())
    return Bundle.open(folder)
